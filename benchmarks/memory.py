"""Peak memory of decomposing and serving, beside the dense model's.

    python benchmarks/memory.py

Each line is a process of its own, with three figures, less those of a process that only imports: the peak of its
resident set, in which mapped model and cache files count as far as they were read; the peak of its anonymous memory
(sampled every 2 ms), which is what the system can't take back; and its anonymous memory at the end, when the work is
done and the model still there. All lines share a new cache folder. "SmolLM2" serves 32
requests, 8 tokens each; "Llama-3-8B layer" is the seven random matrices of one layer of that size in bfloat16, run on
32 rows. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

import t2
from t2.demo.run import QUESTIONS, chat_batch
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.machine import machine
from t2.weights.targets import select_targets, weight_matrix

RESULTS = Path(__file__).parent / "results"
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
    weights = {name: weight_matrix(layer) for name, layer in select_targets(model, "all-linear").items()}
    decompose_weights(weights, FactorCache(), progress=False)


def smollm2_serve(storage: str) -> object:
    model, tokenizer = t2.load(MODEL)
    batch = chat_batch(tokenizer, list(QUESTIONS))
    options = {"max_new_tokens": 8, "do_sample": False}
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
    weights = {name: weight_matrix(layer) for name, layer in select_targets(Layer(), "all-linear").items()}
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
    **{f"SmolLM2: serve, factors {s}": (lambda s=s: smollm2_serve(s)) for s in STORAGE},  # type: ignore[misc]
    "Llama-3-8B layer: make and decompose": llama_decompose,
    "Llama-3-8B layer: dense bfloat16": lambda: llama_layer("dense"),
    **{f"Llama-3-8B layer: factors {s}": (lambda s=s: llama_layer(s)) for s in STORAGE},  # type: ignore[misc]
}


KINDS = ("peak_resident", "peak_anonymous", "anonymous_at_the_end")


class AnonymousPeak(threading.Thread):
    """Samples this process's anonymous resident memory, every `interval` seconds."""

    def __init__(self, interval: float = 0.002) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peak = 0
        self.done = threading.Event()

    def now(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def run(self) -> None:
        while not self.done.wait(self.interval):
            self.peak = max(self.peak, self.now())


def main(phase: str | None = None) -> None:
    """Args:
    phase: Runs one line in this process and prints its three figures in bytes; by default all run, each in its own.
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
    peaks: dict[str, dict[str, int]] = {}
    table = Table(
        "process",
        "peak resident, MB",
        "peak anonymous, MB",
        "at the end, MB",
        title="above a process that only imports",
    )

    def measure(name: str, folder: str) -> list[int]:
        command, environment = [sys.executable, __file__, "--phase", name], {**os.environ, "T2_CACHE": folder}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        if run.returncode:
            raise RuntimeError(f"{name}: {run.stderr}")
        return [int(figure) for figure in run.stdout.split()[-3:]]

    folder = tempfile.TemporaryDirectory()
    measure("SmolLM2: load", folder.name)  # converts the model, once
    for name in tqdm(PHASES):
        peaks[name] = dict(zip(KINDS, measure(name, folder.name), strict=True))
        above = {kind: (peak - peaks["imports only"][kind]) / 1e6 for kind, peak in peaks[name].items()}
        table.add_row(name, *(f"{above[kind]:,.0f}" for kind in KINDS))
    Console().print(table)
    results = {"machine": machine(), "bytes": peaks}
    (RESULTS / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
