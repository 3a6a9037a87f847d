"""`t2 bench`: this machine's limits, one layer and one model beside the dense ones, as a markdown table to paste."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import t2kernels
from t2.adaptation.inference import as_problem
from t2.demo.run import QUESTIONS
from t2.demo.throughput import ServingPath, time_paths
from t2.experts.expert import Expert
from t2.generation.prompts import prompt_batch
from t2.model.svf_model import SVFConfig, SVFModel
from t2.weights.loading import load
from t2.weights.machine import machine
from t2kernels import FactoredWeight, limits
from t2kernels.files import write_text

LAYER = (4096, 4096)
ROWS = (1, 8, 32)
COLD_BYTES = 1 << 28
"""Bytes of the copies of a layer that calls take in turns, so that no cache holds the next one's."""


def run_bench(
    model_name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    model_dtype: torch.dtype = torch.bfloat16,
    new_tokens: int = 32,
    rounds: int = 2,
    results: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measures limits, layer and model on the accelerator, or else the CPU; prints a table and returns the figures.

    Paths of one row of the table take turns, and times are medians. Every request has an expert of its own.

    Args:
        dtype: dtype in which the factors are stored.
        model_dtype: dtype of the dense layer and model beside them.
        new_tokens: tokens generated per request, at least 2.
        rounds: turns of every path of the model.
        results: file for the figures as JSON.
    """
    for name, value, least in (("new_tokens", new_tokens, 2), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    out = console or Console()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with out.status("the machine's limits"):
        peaks = machine_limits(device)
    with out.status(f"a layer of {LAYER[0]} x {LAYER[1]}"):
        layer = layer_seconds(device, dtype, model_dtype)
    with out.status(f"{model_name}") as status:
        model = _model_paths(model_name, device, dtype, model_dtype, new_tokens, rounds, status.update)
    figures = {
        "model": model_name,
        "factor_dtype": str(dtype).removeprefix("torch."),
        "model_dtype": str(model_dtype).removeprefix("torch."),
        "new_tokens": new_tokens,
        "machine": machine() | {"device": _device_name(device)},
        "limits": peaks,
        "layer": layer,
        "paths": model,
    }
    if results is not None:
        write_text(results, json.dumps(figures, indent=1) + "\n")
    out.print(bench_markdown(figures), markup=False, highlight=False, soft_wrap=True)
    return figures


def machine_limits(device: torch.device) -> dict[str, float]:
    """Bytes read a second, and FMAs a second by kind: the best of some tries, with the kernels' own instructions.

    On an accelerator by torch's sum of a large tensor and torch's product of large matrices.
    """
    if device.type != "cpu":
        data = torch.ones(1 << 28, dtype=torch.float32, device=device)
        square = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
        read = _best(lambda: data.sum(), device)
        product = _best(lambda: square @ square, device)
        return {"read": data.nbytes / read, "bfloat16": 8192**3 / product}
    if not t2kernels.backends()["cpu"].startswith("available"):
        return {}
    reader = limits.Reader()
    peaks = {"read": (1 << 28) / _best(lambda: reader.read(1 << 28), device)}
    for kind in limits.ARITHMETIC:
        if done := limits.multiply_adds(kind, 1 << 28):
            peaks[kind] = done / _best(lambda kind=kind: limits.multiply_adds(kind, 1 << 28), device)  # type: ignore[misc]
    return peaks


def layer_seconds(
    device: torch.device, dtype: torch.dtype, model_dtype: torch.dtype
) -> dict[str, dict[str, list[float]]]:
    """Seconds of one layer for each number of rows: ours, an expert a row, and dense; weights not in caches."""
    generator = torch.Generator().manual_seed(0)
    out_features, in_features = LAYER
    rank = min(LAYER)
    u = torch.randn(out_features, rank, generator=generator) / math.sqrt(rank)
    vh = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
    s = torch.rand(rank, generator=generator) + 0.5
    packed = FactoredWeight.pack(u.to(device), s.to(device), vh.to(device), dtype=dtype)
    copies = [packed] + [
        FactoredWeight.pack(u.to(device), s.to(device), vh.to(device), dtype=dtype)
        for _ in range(math.ceil(COLD_BYTES / packed.nbytes) - 1)
    ]
    weight = ((u * s) @ vh).to(device, model_dtype)
    dense = [weight.clone() for _ in range(math.ceil(COLD_BYTES / weight.nbytes))]
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, in_features, generator=generator).to(device, model_dtype)
        scales = (s * (1 + 0.1 * torch.randn(rows, rank, generator=generator))).to(device)
        slots = torch.arange(rows, device=device)
        ours, others = itertools.cycle(copies), itertools.cycle(dense)
        paths: dict[str, Callable[[], object]] = {
            "ours": lambda x=x, scales=scales, slots=slots, ours=ours: next(ours).linear(x, scales, slots),  # type: ignore[misc]
            "dense": lambda x=x, others=others: F.linear(x, next(others)),  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        with torch.inference_mode():
            for turn in range(9):
                for name, path in paths.items():
                    took = _seconds(path, device)
                    if turn:  # the first ones start threads and compile kernels
                        seconds[name].append(took)
        found[str(rows)] = seconds
    return found


def _model_paths(
    model_name: str,
    device: torch.device,
    dtype: torch.dtype,
    model_dtype: torch.dtype,
    new_tokens: int,
    rounds: int,
    announce: Callable[[str], object],
) -> dict[str, list[dict[str, Any]]]:
    dense, processor = load(model_name, dtype=model_dtype, device=device)
    svf = SVFModel(load(model_name, dtype=model_dtype, device=device)[0], SVFConfig(dtype=dtype))
    names = [f"expert{i}" for i in range(max(ROWS))]
    for seed, name in enumerate(names):
        svf.add_expert(name, Expert.random(svf.layout, seed=seed))
    found = {}
    for rows in (1, max(ROWS)):
        batch = {
            name: tensor.to(device)
            for name, tensor in prompt_batch([as_problem(text) for text in QUESTIONS[:rows]], processor).items()
        }
        paths = [
            ServingPath("dense", 0, lambda n, **kw: dense.generate(**kw), rounds),  # type: ignore[operator]
            ServingPath("ours", rows, lambda n, **kw: svf.generate(experts=names[:n], **kw), rounds),
        ]
        measured = time_paths(paths, batch, new_tokens, lambda path, rows=rows: announce(f"{path}, {rows} requests"))  # type: ignore[misc]
        found[str(rows)] = [
            asdict(each)
            | {"tokens_per_second": each.tokens_per_second, "decode_tokens_per_second": each.decode_tokens_per_second}
            for each in measured
        ]
    return found


def bench_markdown(figures: Mapping[str, Any]) -> str:
    """The figures as a paragraph and a table in markdown."""
    about, peaks = figures["machine"], figures["limits"]
    flops = ", ".join(f"{2 * rate / 1e9:.0f} {kind}" for kind, rate in peaks.items() if kind != "read")
    said = f" Limits: {peaks['read'] / 1e9:.0f} GB/s read; GFLOP/s {flops}." if peaks else ""
    dense, factors = figures["model_dtype"], figures["factor_dtype"]
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['kernels'].get('chosen', 'no')} kernels.{said}",
        "",
        f"| every request with an expert of its own | ours, {factors} factors | dense, {dense}, no experts | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for rows, seconds in figures["layer"].items():
        ours, others = (statistics.median(seconds[name]) for name in ("ours", "dense"))
        label = f"layer {LAYER[0]} x {LAYER[1]}, {rows} row{'s' if rows != '1' else ''}"
        ratio = _ratio(seconds["dense"], seconds["ours"])
        lines.append(f"| {label} | {1e3 * ours:.2f} ms | {1e3 * others:.2f} ms | {ratio:.2f}x |")
    for rows, paths in figures["paths"].items():
        by_name = {path["name"]: path for path in paths}
        label = f"{figures['model']}, {rows} request{'s' if rows != '1' else ''} of {figures['new_tokens']} new tokens"
        cells = [f"{by_name[name]['tokens_per_second']:.0f} tokens/s" for name in ("ours", "dense")]
        ratio = _ratio(by_name["dense"]["seconds"], by_name["ours"]["seconds"])
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {ratio:.2f}x |")
    return "\n".join(lines)


def _ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over turns."""
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def _device_name(device: torch.device) -> str:
    return str(machine()["processor"]) if device.type == "cpu" else torch.cuda.get_device_name(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    context = nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with context:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start


def _best(run: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    return min(_seconds(run, device) for _ in range(tries))
