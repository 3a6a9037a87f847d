"""SmolLM2 answering: tokens a second of every way to serve, taking turns in one run.

    python benchmarks/serving.py [--new-tokens 64] [--rounds 3]

A batch of 32 chat requests with 32 experts, then a single request. Writes benchmarks/results/cpu-serving.json.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import tyro
from fidelity import MODEL, RESULTS, STORAGE
from rich.console import Console
from transformers.utils import logging

import t2
from t2.demo import baselines as peers
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import PathResult, ServingPath, time_paths
from t2.weights.machine import machine


def wrapped(experts: int, options: dict[str, Any]) -> t2.SVFModel:
    svf = t2.SVFModel(t2.load(MODEL)[0], t2.SVFConfig(progress=False, **options))
    for i in range(experts):
        svf.add_expert(f"e{i}", t2.Expert.random(svf.layout, seed=i))
    return svf


def main(new_tokens: int = 64, rounds: int = 3) -> None:
    """Args:
    new_tokens: For each request, after prompts of about 40 tokens.
    rounds: Turns that each path takes.
    """
    out = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense, tokenizer = t2.load(MODEL)
    served = {f"ours {name}": wrapped(len(QUESTIONS), options) for name, options in STORAGE.items()}
    suffixes = sorted({name.rpartition(".")[2] for name in served["ours float32"].layout.names})
    with out.status("adding 32 LoRA adapters"):
        lora, adapters = peers.with_lora(copy.deepcopy(dense), suffixes, len(QUESTIONS))
    results: dict[str, list[dict[str, Any]]] = {}
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
        results[str(requests)] = [figures(result) for result in measured]
        for result in measured:
            decode = result.decode_tokens_per_second
            out.print(
                f"{requests:3} requests  {result.name:32}{result.tokens_per_second:8.1f} tokens/s, decode {decode:.1f}"
            )
    text = json.dumps({"machine": machine(), "new_tokens": new_tokens, "requests": results}, indent=1)
    (RESULTS / "cpu-serving.json").write_text(text + "\n")


def figures(result: PathResult) -> dict[str, Any]:
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
