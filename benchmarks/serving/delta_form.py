"""The delta form beside the dense model and the factored form: tokens a second, and bytes.

    python -m benchmarks.serving.delta_form [--new-tokens 64] [--rounds 9]

SmolLM2-135M-Instruct with bfloat16 weights and products, 32 requests with 32 experts and a single one, all paths in
turns. "dense" is the same model on the same kernels without experts. Bytes are those of Llama-3-8B's matrices, of which
one of each shape is packed. Writes benchmarks/results/delta-form.json.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.kernels.linear import SHAPES
from benchmarks.serving.throughput import record
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import ServingPath, time_paths
from t2.weights.machine import machine
from t2kernels import DeltaWeight, FactoredWeight
from t2kernels.packing import INT4

MODEL = "smollm2-135m-instruct"
SUPPORTS = (64, 128, 256)
FULL = "factored"
LLAMA = {"Llama-3-8B q, o": 2, "Llama-3-8B k, v": 2, "Llama-3-8B gate, up": 2, "Llama-3-8B down": 1}
"""Matrices of a layer of Llama-3-8B by shape."""


def wrapped(experts: int, **form: Any) -> t2.SVFModel:
    config = t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False, **form)
    svf = t2.SVFModel(t2.load(MODEL)[0], config)
    table = svf.slot_table
    for i in range(experts):
        noise = torch.randn(len(table.column_sigma), generator=torch.Generator().manual_seed(i))
        svf.add_expert(f"e{i}", t2.Expert(table.with_columns(1 + 0.02 * noise), svf.layout))
    return svf


def matrix_bytes() -> dict[str, int]:
    """Bytes of Llama-3-8B's matrices in several forms, from what packing one of each shape holds."""
    found: dict[str, int] = {"dense bfloat16": 0, "factored bfloat16": 0}
    for name, count in LLAMA.items():
        out, inputs = SHAPES[name]
        weight = torch.randn(out, inputs)
        found["dense bfloat16"] += 32 * count * 2 * weight.numel()
        rank = min(out, inputs)
        u, s, vh = torch.randn(out, rank), torch.ones(rank), torch.randn(rank, inputs)
        packed = FactoredWeight.pack(u, s, vh, dtype=torch.bfloat16)
        found["factored bfloat16"] += 32 * count * packed.nbytes
        for dtype in (torch.bfloat16, torch.int8, INT4):
            key = f"delta {str(dtype).removeprefix('torch.')}, 256"
            pair = DeltaWeight.pack(weight, u[:, :256], s[:256], vh[:256], dtype=dtype)
            found[key] = found.get(key, 0) + 32 * count * pair.nbytes
    return found


def delta_table(results: Any) -> Table:
    """Tokens a second of every form, with ratios to the dense model and to the factored form."""
    rows = []
    for requests, paths in results["requests"].items():
        seconds = {path["name"]: path["seconds"] for path in paths}

        def ratio(name: str, other: str, seconds: Any = seconds) -> str:
            return f"{statistics.median(a / b for a, b in zip(seconds[other], seconds[name], strict=True)):.2f}"

        for path in paths:
            name = path["name"]
            rows.append([name, requests, f"{path['tokens_per_second']:.0f}", ratio(name, "dense"), ratio(name, FULL)])
    size = results["llama_bytes"]
    sizes = ", ".join(f"{name} {size[name] / 1e9:.1f} GB ({size[name] / size['dense bfloat16']:.2f})" for name in size)
    return Table(
        f"SmolLM2-135M-Instruct, bfloat16 weights and products, an expert for every request, {results['new_tokens']} "
        f"new tokens each, {results['machine']['threads']} cores of {results['machine']['processor']}, all paths in "
        f"turns, medians of {results['rounds']} (`python -m benchmarks.serving.delta_form`):",
        ["form", "requests", "tokens/s", "/ dense", "/ factored"],
        rows,
        f"All matrices of Llama-3-8B as they are packed: {sizes}.",
    )


def main(new_tokens: int = 64, rounds: int = 9, results: Path = RESULTS / "delta-form.json") -> None:
    """Args:
    new_tokens: For each request, after prompts of about 40 tokens.
    rounds: Turns that each path takes.
    results: File for the results as JSON.
    """
    out = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    _, tokenizer = t2.load(MODEL)
    served = {f"support {k}": wrapped(len(QUESTIONS), form="delta", support=k) for k in SUPPORTS}
    served[FULL] = wrapped(len(QUESTIONS))
    plain = served["support 64"]
    by_requests: dict[str, list[dict[str, Any]]] = {}
    for requests in (len(QUESTIONS), 1):
        names = [f"e{i}" for i in range(requests)]
        paths = [ServingPath("dense", 0, lambda n, **kw: plain.generate(experts=[None] * n, **kw), rounds)]
        for name, svf in served.items():
            paths.append(
                ServingPath(
                    name, requests, lambda n, svf=svf, names=names, **kw: svf.generate(experts=names[:n], **kw), rounds
                )
            )
        batch = chat_batch(tokenizer, list(QUESTIONS[:requests]))
        with out.status("timing") as status:
            measured = time_paths(paths, batch, new_tokens, lambda name: status.update(f"timing: {name}"))
        by_requests[str(requests)] = [record(result) for result in measured]
    found = {
        "machine": machine(),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "requests": by_requests,
        "llama_bytes": matrix_bytes(),
    }
    write_results(results, found)
    delta_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
