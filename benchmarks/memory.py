"""Peak memory of decomposing and serving, beside the dense model's.

    python benchmarks/memory.py

Each line is a process of its own; the figure is its peak resident set less that of a process that only imports, so
mapped model files count as far as they were read. "SmolLM2" serves 32 requests, 8 tokens each; "Llama-3-8B layer" is
the seven random matrices of one layer of that size in bfloat16, run on 32 rows. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
import tyro
from machine import RESULTS, machine
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

import t2
from t2.demo import QUESTIONS, chat_batch
from t2.svd import FactorCache, decompose_weights
from t2.targets import select_targets, weight_matrix

MODEL = "smollm2-135m-instruct"
LLAMA_3_8B_LAYER = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
STORAGE = ("float32", "bfloat16", "float16", "int8")


def smollm2_load() -> None:
    t2.load(MODEL)


def smollm2_decompose() -> None:
    model, _ = t2.load(MODEL)
    weights = {name: weight_matrix(layer) for name, layer in select_targets(model, "all-linear").items()}
    with tempfile.TemporaryDirectory() as folder:
        decompose_weights(weights, FactorCache(folder), progress=False)


def smollm2_serve(storage: str) -> None:
    model, tokenizer = t2.load(MODEL)
    batch = chat_batch(tokenizer, list(QUESTIONS))
    options = {"max_new_tokens": 8, "do_sample": False}
    if storage == "dense":
        model.generate(**batch, **options)  # type: ignore[operator]
        return
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=getattr(torch, storage), progress=False))
    names = [f"e{i}" for i in range(len(QUESTIONS))]
    for seed, name in enumerate(names):
        svf.add_expert(name, t2.Expert.random(svf.layout, seed=seed))
    svf.generate(**batch, experts=names, **options)


class Layer(nn.Module):
    """The seven matrices, each on inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.ModuleDict(
            {
                name: nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
                for name, (outputs, inputs) in LLAMA_3_8B_LAYER.items()
            }
        )

    def forward(self, rows: int) -> None:
        for name, (_, inputs) in LLAMA_3_8B_LAYER.items():
            self.mlp[name](torch.ones(rows, inputs, dtype=torch.bfloat16))


@torch.no_grad()
def llama_layer(storage: str) -> None:
    layer = Layer()
    if storage == "dense":
        layer(32)
        return
    svf = t2.SVFModel(layer, t2.SVFConfig(dtype=getattr(torch, storage), progress=False))
    svf.add_expert("e", t2.Expert.random(svf.layout))
    svf(32, experts="e")


PHASES: dict[str, Callable[[], None]] = {
    "imports only": lambda: None,
    "SmolLM2: load": smollm2_load,
    "SmolLM2: serve, dense float32": lambda: smollm2_serve("dense"),
    "SmolLM2: load and decompose": smollm2_decompose,
    **{f"SmolLM2: serve, factors {s}": (lambda s=s: smollm2_serve(s)) for s in STORAGE},  # type: ignore[misc]
    "Llama-3-8B layer: dense bfloat16": lambda: llama_layer("dense"),
    "Llama-3-8B layer: decompose, then factors bfloat16": lambda: llama_layer("bfloat16"),
    **{f"Llama-3-8B layer: factors {s}": (lambda s=s: llama_layer(s)) for s in STORAGE},  # type: ignore[misc]
}


def main(phase: str | None = None) -> None:
    """Args:
    phase: Runs one line in this process and prints its peak in bytes; by default all run, each in its own.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if phase is not None:
        PHASES[phase]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    peaks: dict[str, int] = {}
    table = Table("process", "peak MB above imports")
    for name in PHASES:
        run = subprocess.run([sys.executable, __file__, "--phase", name], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{name}: {run.stderr}")
        peaks[name] = int(run.stdout.split()[-1])
        table.add_row(name, f"{(peaks[name] - peaks['imports only']) / 1e6:,.0f}")
        print(name, f"{(peaks[name] - peaks['imports only']) / 1e6:,.0f} MB", flush=True)
    Console().print(table)
    results = {"machine": machine(), "peak_bytes": peaks}
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
