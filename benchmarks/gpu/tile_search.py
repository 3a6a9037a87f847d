"""Candidate tiles for the launches of a decode step and of prefill, timed one launch at a time.

python -m benchmarks.gpu.tile_search --compile --jobs 2     # fill Triton's cache for sm_90, without a GPU
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.compile_only import using_tile
from benchmarks.gpu.harness import GROUPS, Call, Clock, Layers, Results, name_of
from t2kernels.packing import interleave
from t2kernels.triton import launch, tuning
from t2kernels.triton.tuning import Tile
from t2kernels.weights import float16_rank


def decode_tiles(rows: int, storage: torch.dtype) -> list[Tile]:
    """Deep ones for launches of few tiles, shallow ones where several programs share an SM."""
    m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    first: dict[str, Any] = {"weights_first": True, "prefetch": 2, "overlap": True}
    if storage == torch.int8:
        deep = 2 if m == 64 else 4
        return [
            Tile(m, 64, 256, 4, 3, **first),
            Tile(m, 64, 256, 4, deep, **first),
            Tile(m, 32, 256, 4, deep, **first),
            Tile(m, 128, 256, 8, 2 if m == 64 else 3, **first),
        ]
    return [Tile(m, 64, 128, 4, 4, **first), Tile(m, 64, 128, 4, 5 if m == 64 else 6, **first)]


def prefill_tiles(step: str, storage: torch.dtype) -> list[Tile]:
    first: dict[str, Any] = {"weights_first": True}
    if storage == torch.int8:
        return [Tile(128, 128, 256, 8, 2, **first), Tile(128, 64, 256, 4, 2, **first)]
    return [Tile(256, 128, 64, 8, 3, persistent=True, **first), Tile(256, 128, 64, 8, 4, persistent=True, **first)]


def calls(layers: Layers, weights: Sequence[Sequence[Any]], step: str, rows: int) -> tuple[list[Call], list[Tensor]]:
    """The launches of one step of the group, one for each copy of its weights, and what they write."""
    device, ranks = layers.device, layers.ranks
    ids = torch.arange(rows, device=device) % 32
    x = _random(rows, layers.inputs, device)
    scales = layers.scales(32) if device.type == "cpu" else layers.fixed_scales
    s = _random(rows, sum(ranks), device)
    ys = [torch.empty(rows, out, device=device, dtype=torch.bfloat16) for out in layers.outs]
    parts = len(weights[0][0].vh)
    widths = [part.shape[0] for w in weights[0] for part in w.vh]

    def by_part(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(
            itertools.chain.from_iterable(
                t.split(widths[i * parts : (i + 1) * parts], dim=-1) for i, t in enumerate(tensors)
            )
        )

    def make(copy: Sequence[Any]) -> Call:
        u = [w.u for w in copy]
        vh = [[part] for w in copy for part in w.vh]
        components = None if copy[0].component_scale is None else by_part([w.component_scale for w in copy])
        windows = list(s.split(ranks, dim=1))

        def project() -> None:
            launch._Product("project", [x] * len(vh), x.dtype, vh).into(
                by_part(windows), scales=by_part(scales), slots=ids, column_scales=components
            )

        def expand() -> None:
            launch._Product("expand", windows, x.dtype, u).into(ys)

        return project if step == "project" else expand

    return [make(copy) for copy in weights], [s] if step == "project" else ys


def _random(rows: int, features: int, device: torch.device) -> Tensor:
    """The first rows of the same normal matrix each time; without data on the CPU."""
    if device.type == "cpu":
        return torch.empty(rows, features, dtype=torch.bfloat16)
    g = torch.Generator(device).manual_seed(features)
    return torch.randn(2048, features, device=device, generator=g).bfloat16()[:rows]


def _fingerprint(outputs: Sequence[Tensor]) -> int:
    """Checksum of the bits of the first eight rows."""
    total = 0
    for output in outputs:
        bits = output[:8].contiguous().view(torch.int16).long().flatten()
        total += int(((bits + 40000) * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum())
    return total


STORAGES = (torch.bfloat16, torch.int8)


def cases(groups: Sequence[str]) -> Iterator[tuple[str, str, torch.dtype, int, Tile]]:
    """(group, step, storage, rows, tile)"""
    for group, storage in itertools.product(groups, STORAGES):
        for rows, step in itertools.product((8, 32, 64), ("project", "expand")):
            for tile in decode_tiles(rows, storage):
                yield group, step, storage, rows, tile
        for step in ("project", "expand"):
            for tile in prefill_tiles(step, storage):
                yield group, step, storage, 2048, tile


def label(tile: Tile) -> str:
    marks = ("w" if tile.weights_first else "x") + ("+" if tile.overlap else "") + ("p" if tile.persistent else "")
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.warps}w {tile.stages}s {marks}"


def measure(results: Results, device: torch.device, smoke: bool, groups: Sequence[str] = tuple(GROUPS)) -> None:
    clock = Clock(device, 0.008)
    for (group, storage), own in itertools.groupby(cases(groups), key=lambda c: (c[0], c[2])):
        layers = Layers(*GROUPS[group], clock)
        layers.fixed_scales = layers.scales(32)
        with torch.inference_mode():
            for _, step, _, rows, tile in own:
                name = f"tile | {group} | {step} | {name_of(storage)} | {rows} | {label(tile)}"
                results.once(name, functools.partial(_timed, layers, storage, step, rows, tile))
        del layers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    keep_fastest(results, device)


def _timed(layers: Layers, storage: torch.dtype, step: str, rows: int, tile: Tile) -> dict[str, Any]:
    packed = layers.packed(storage)
    with using_tile(tile) as launches:
        made, outputs = calls(layers, packed, step, rows)
        made[0]()
        bits = _fingerprint(outputs)
        found = layers.clock(made)
    read = sum(p.nbytes for w in packed[0] for p in (w.vh if step == "project" else w.u))
    return {**found, "bits": bits, "bytes": read, "tile": asdict(tile), "launch": launches[0].key}


def keep_fastest(results: Results, device: torch.device) -> None:
    """Writes the fastest tile of each launch to the device's tuning file, also for the fewer rows it stands for."""
    best: dict[str, dict[str, Any]] = {}
    for name, found in results.data.items():
        if name.startswith("tile | ") and "seconds" in found:
            kept = best.get(found["launch"])
            if kept is None or found["seconds"] < kept["seconds"]:
                best[found["launch"]] = found
    fewer = {8: (1, 2, 4, 8, 16), 2048: (512, 1024, 2048, 4096)}
    measured = {}
    for key, found in best.items():
        rows = int(key.split("rows<=")[1].split(" ")[0])
        for bucket in fewer.get(rows, (rows,)):
            measured[key.replace(f"rows<={rows} ", f"rows<={bucket} ")] = Tile(**found["tile"])
    print(f"{len(measured)} tiles in {tuning.save(measured, device)}", flush=True)


# Ahead of time, without a GPU


def _empty(n: int, k: int, dtype: torch.dtype) -> Tensor:
    matrix = torch.empty(n, k, dtype=dtype)
    return interleave(matrix) if dtype == torch.int8 else matrix


class _Shape:
    """Packed weight without data: the attributes of a FactoredWeight that `calls` reads."""

    def __init__(self, out: int, inputs: int, storage: torch.dtype) -> None:
        rank = min(out, inputs)
        head = float16_rank(rank) if storage.itemsize == 1 else 0
        kinds = [(r, t) for r, t in ((head, torch.float16), (rank - head, storage)) if r]
        self.u = [_empty(out, r, t) for r, t in kinds]
        self.vh = [_empty(r, inputs, t) for r, t in kinds]
        self.component_scale = torch.empty(rank) if head else None


def compile_case(case: tuple[str, str, torch.dtype, int, Tile]) -> str:
    """Compiles one launch into Triton's cache; returns the error, or an empty string."""
    from benchmarks.gpu.compile_only import compiling

    group, step, storage, rows, tile = case
    inputs, outs = GROUPS[group]
    layers = Layers.__new__(Layers)
    layers.inputs, layers.outs, layers.device = inputs, outs, torch.device("cpu")
    layers.ranks = [min(out, inputs) for out in outs]
    try:
        with compiling() as made, using_tile(tile):
            for call in calls(layers, [[_Shape(out, inputs, storage) for out in outs]], step, rows)[0]:
                call()
    except Exception as error:  # one of many; named in the report
        return f"{case}: {type(error).__name__}: {error}"
    return "" if made else f"{case}: nothing was compiled"


def compile_all(jobs: int) -> None:
    """Fills Triton's cache with every launch that `measure` times; prints what does not compile."""
    wanted = list(cases(tuple(GROUPS)))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for i, problem in enumerate(pool.imap_unordered(compile_case, wanted)):
            if problem or i % 20 == 0:
                print(f"{i + 1}/{len(wanted)} {problem}", flush=True)


def compile_stage(results: Results, device: torch.device, smoke: bool) -> None:
    """Compiles every launch that `measure` times, in nearly as many processes as there are cores."""
    if smoke:
        results.put("compile", {"skipped": "minutes without many cores"})
        return
    compile_all(max(2, (os.cpu_count() or 2) - 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compile",
        action="store_true",
        required=True,
        help="compile only; `benchmarks.gpu.run --stages tiles` times them",
    )
    parser.add_argument("--jobs", type=int, default=2)
    compile_all(parser.parse_args().jobs)


if __name__ == "__main__":
    main()
