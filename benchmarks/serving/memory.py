"""Peak memory of decomposing and serving, beside the dense model's.

    python -m benchmarks.serving.memory

Each phase is a process of its own with three sizes, above those of a process that only imports: peak resident set,
which counts the pages of mapped model and cache files that were read; peak anonymous memory (sampled every 2 ms), which
the system cannot take back; and anonymous memory at the end, with the model still loaded. All share a new cache folder.
"SmolLM2" serves 32 requests, 8 tokens each; "Llama-3-8B layer" is the seven random matrices of one layer of that size
in bfloat16, run on 32 rows. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

import t2
from benchmarks.common.memory import AnonymousPeak
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2.demo.run import QUESTIONS, chat_batch
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.machine import machine
from t2.weights.targets import plain_targets, weight_matrix

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


def smollm2_load() -> object:
    return t2.load(MODEL)


def smollm2_decompose() -> None:
    model, _ = t2.load(MODEL)
    weights = {name: weight_matrix(layer) for name, layer in plain_targets(model, "all-linear").items()}
    decompose_weights(weights, FactorCache(), progress=False)


def smollm2_serve(storage: str) -> object:
    model, tokenizer = t2.load(MODEL)
    batch = chat_batch(tokenizer, list(QUESTIONS))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    if storage == "dense":
        model.generate(**batch, **options)  # type: ignore[operator]
        return model
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=getattr(torch, storage), progress=False))
    names = [f"e{i}" for i in range(len(QUESTIONS))]
    for seed, name in enumerate(names):
        svf.add_expert(name, t2.Expert.random(svf.layout, seed=seed))
    svf.generate(**batch, experts=names, **options)
    return svf


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


def llama_decompose() -> None:
    weights = {name: weight_matrix(layer) for name, layer in plain_targets(Layer(), "all-linear").items()}
    decompose_weights(weights, FactorCache(), progress=False)


@torch.no_grad()
def llama_layer(storage: str) -> object:
    layer = Layer()
    if storage == "dense":
        layer(32)
        return layer
    svf = t2.SVFModel(layer, t2.SVFConfig(dtype=getattr(torch, storage), progress=False))
    svf.add_expert("e", t2.Expert.random(svf.layout))
    svf(32, experts="e")
    return svf


PHASES: dict[str, Callable[[], object]] = {
    "imports only": lambda: time.sleep(0.1),
    "SmolLM2: load": smollm2_load,
    "SmolLM2: load and decompose": smollm2_decompose,
    "SmolLM2: serve, dense float32": lambda: smollm2_serve("dense"),
    **{f"SmolLM2: serve, factors {s}": (lambda s=s: smollm2_serve(s)) for s in STORAGE},
    "Llama-3-8B layer: make and decompose": llama_decompose,
    "Llama-3-8B layer: dense bfloat16": lambda: llama_layer("dense"),
    **{f"Llama-3-8B layer: factors {s}": (lambda s=s: llama_layer(s)) for s in STORAGE},
}


KINDS = ("peak_resident", "peak_anonymous", "anonymous_at_the_end")


def memory_table(results: Any) -> Table:
    """Memory of every process above one that only imports."""
    processes = dict(results["bytes"])
    base = processes.pop("imports only")
    return Table(
        "Memory in MB above the imports (`python -m benchmarks.serving.memory`). Resident counts mapped model and "
        "cache files, which the system can drop; dense SmolLM2 is served straight from its mapped file.",
        ["process", "peak resident", "peak anonymous", "anonymous at the end"],
        [[name, *(f"{(sizes[kind] - base[kind]) / 1e6:,.0f}" for kind in KINDS)] for name, sizes in processes.items()],
    )


def measure_process(name: str, cache: str) -> dict[str, int]:
    """Bytes of each kind in a process that runs one phase."""
    command = [sys.executable, "-m", "benchmarks.serving.memory", "--phase", name]
    environment = {**os.environ, "T2_CACHE": cache}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr}")
    return dict(zip(KINDS, map(int, run.stdout.split()[-3:]), strict=True))


def main(phase: str | None = None, results: Path = RESULTS / "memory.json") -> None:
    """Args:
    phase: Run this phase in this process and print its three sizes in bytes; default all, each in a process.
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if phase is not None:
        sampler = AnonymousPeak()
        sampler.start()
        model = PHASES[phase]()
        gc.collect()
        end = sampler.now()
        sampler.done.set()
        sampler.join()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sampler.peak, end)
        del model
        return
    with tempfile.TemporaryDirectory() as cache:
        measure_process("SmolLM2: load", cache)  # converts the model, once
        sizes = {name: measure_process(name, cache) for name in tqdm(PHASES)}
    found = {"machine": machine(), "bytes": sizes}
    write_results(results, found)
    memory_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
