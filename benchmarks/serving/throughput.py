"""Tokens a second of every way to serve SmolLM2, taking turns in one run.

    python -m benchmarks.serving.throughput [--new-tokens 64] [--rounds 3]

A batch of 32 chat requests with 32 experts, then a single request. Writes benchmarks/results/cpu-serving.json.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.serving.fidelity import MODEL, STORAGE
from t2.demo import baselines
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import PathResult, ServingPath, time_paths
from t2.weights.machine import machine


def wrapped(experts: int, options: dict[str, Any]) -> t2.SVFModel:
    svf = t2.SVFModel(t2.load(MODEL)[0], t2.SVFConfig(progress=False, **options))
    for i in range(experts):
        svf.add_expert(f"e{i}", t2.Expert.random(svf.layout, seed=i))
    return svf


def throughput_table(results: Any) -> Table:
    """Every way to serve, with its ratio to the dense model."""
    rows = []
    for requests, paths in results["requests"].items():
        dense = next(path for path in paths if path["name"].startswith("dense"))
        for path in paths:
            ratios = [d / p for d, p in zip(dense["seconds"], path["seconds"], strict=True)]
            decode = [d / p for d, p in zip(dense["step_seconds"], path["step_seconds"], strict=True)]
            rows.append(
                [
                    path["name"],
                    requests,
                    str(path["experts"]),
                    f"{path['tokens_per_second']:.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{path['decode_tokens_per_second']:.0f}",
                    f"{statistics.median(decode):.2f}",
                ]
            )
    return Table(
        f"SmolLM2-135M-Instruct, prompts of about 40 tokens, {results['new_tokens']} new tokens each, all paths in "
        f"turns (`python -m benchmarks.serving.throughput`; {results['machine']['kernels']['chosen']} kernels):",
        ["path", "requests", "experts", "tokens/s", "/ dense", "decode tokens/s", "/ dense"],
        rows,
    )


def headline(results: Any) -> Table:
    """The README's claim: float32 against the dense model without experts and PEFT's mixed batch."""
    seconds = {path["name"]: path["seconds"] for path in results["requests"]["32"]}
    ours = seconds["ours float32"]

    def speedup(name: str) -> str:
        return f"{statistics.median(d / p for d, p in zip(seconds[name], ours, strict=True)):.1f}"

    machine = results["machine"]
    return Table(
        "**A batch of 32 requests with 32 different experts runs "
        f"{speedup('dense float32, no experts')} times as fast as the dense model without any, and "
        f"{speedup('PEFT LoRA r=16, mixed')} times as fast as PEFT's mixed LoRA batch** (SmolLM2-135M-Instruct on "
        f"{machine['threads']} cores of {machine['processor']}, transformers, all in float32; "
        "`python -m benchmarks.serving.throughput`)."
    )


def demo_table(results: Any) -> Table:
    """Every way to serve in `t2 demo`, and its two-pass adaptation."""
    paths = {path["name"]: path for path in results["paths"]}
    ours = paths["ours"]
    rows = []
    for name, path in sorted(paths.items(), key=lambda item: -item[1]["tokens_per_second"]):
        decode = path["decode_tokens_per_second"]
        rows.append(
            [
                f"**{name}**" if path is ours else name,
                str(path["experts"]),
                f"{path['tokens_per_second']:.0f}",
                f"{ours['tokens_per_second'] / path['tokens_per_second']:.2f}",
                f"{decode:.0f}" if decode else "",
                f"{ours['decode_tokens_per_second'] / decode:.2f}" if decode else "",
            ]
        )
    machine, adapted = results["machine"], results["adaptation"]
    return Table(
        f"A batch of {adapted['requests']} requests, problems of three domains among other questions, with the bank of "
        f"experts that ships: a first pass gives {adapted['dispatched_right']} of them the expert of their domain "
        f"({adapted['first_seconds']:.2f} s), the second answers ({adapted['second_seconds']:.2f} s); the base alone "
        f"takes {adapted['base_seconds']:.2f} s. Right answers: base {adapted['base_accuracy']:.0%}, adapted "
        f"**{adapted['adapted_accuracy']:.0%}**.\n\n"
        f"Measured by `make demo` on {machine['processor']}, {machine['threads']} cores, torch {machine['torch']}, "
        f"{machine['kernels']['chosen']} kernels: SmolLM2-135M-Instruct, {ours['requests']} chat requests in a batch, "
        f"{ours['new_tokens']} new tokens each, {results['dtype']}. All paths in the same run.",
        ["path", "experts in a batch", "tokens/s", "ours / this", "decode tokens/s", "ours / this"],
        rows,
        f"{results['rows_equal_to_merged_model']} of {ours['requests']} rows give the same 32 greedy tokens as "
        f"their expert merged into a plain model; logits differ by {results['largest_logit_difference']:.1e} at most.",
    )


def main(new_tokens: int = 64, rounds: int = 3, results: Path = RESULTS / "cpu-serving.json") -> None:
    """Args:
    new_tokens: For each request, after prompts of about 40 tokens.
    rounds: Turns that each path takes.
    results: File for the results as JSON.
    """
    out = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense: Any
    dense, tokenizer = t2.load(MODEL)
    served = {f"ours {name}": wrapped(len(QUESTIONS), options) for name, options in STORAGE.items()}
    suffixes = sorted({name.rpartition(".")[2] for name in served["ours float32"].layout.names})
    with out.status("adding 32 LoRA adapters"):
        lora, adapters = baselines.with_lora(copy.deepcopy(dense), suffixes, len(QUESTIONS))
    by_requests: dict[str, list[dict[str, Any]]] = {}
    for requests in (len(QUESTIONS), 1):
        names = [f"e{i}" for i in range(requests)]
        paths = [
            ServingPath("dense float32, no experts", 0, lambda n, **kw: dense.generate(**kw), rounds),
            *(
                ServingPath(
                    name,
                    requests,
                    lambda n, svf=svf, names=names, **kw: svf.generate(experts=names[:n], **kw),
                    rounds,
                )
                for name, svf in served.items()
            ),
            ServingPath(
                "PEFT LoRA r=16, mixed",
                requests,
                lambda n, **kw: lora.generate(adapter_names=adapters[:n], **kw),
                rounds,
            ),
        ]
        batch = chat_batch(tokenizer, list(QUESTIONS[:requests]))
        with out.status("timing") as status:
            measured = time_paths(paths, batch, new_tokens, lambda name: status.update(f"timing: {name}"))
        by_requests[str(requests)] = [record(result) for result in measured]
    found = {"machine": machine(), "new_tokens": new_tokens, "requests": by_requests}
    write_results(results, found)
    throughput_table(found).show()


def record(result: PathResult) -> dict[str, Any]:
    rounded = {key: [round(s, 5) for s in asdict(result)[key]] for key in ("seconds", "step_seconds")}
    return {
        "name": result.name,
        "experts": result.experts,
        **rounded,
        "tokens_per_second": round(result.tokens_per_second, 2),
        "decode_tokens_per_second": round(result.decode_tokens_per_second or 0, 2),
    }


if __name__ == "__main__":
    tyro.cli(main)
