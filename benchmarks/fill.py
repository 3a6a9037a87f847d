"""How far the launches of a decode step fill a GPU with the tiles of the tuning tables, and what split-K could add.

    python benchmarks/fill.py

Memory delivers its bandwidth only while bandwidth x latency bytes are under way. So a launch is counted by tiles (a
program each), by the multiprocessors they keep busy and by the bytes of weights that they have under way, and takes

    for every wave of tiles: max(its bytes / bandwidth, latency x steps of a tile / steps under way)

Split-K would cut every tile's reduction into slices, a program each, and add their sums in order in a launch of its
own: the same slices at every batch size, or a row's bits would depend on it. What is stated is the best it can do:
the time it saves before that second launch, with its sums free of cost. Predictions from data sheets and from what
`benchmarks/triton_compile.py` found that tiles take, not measurements. Writes benchmarks/results/fill.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.readme import RESULTS, read
from benchmarks.roofline import BANDWIDTH_SHARE, CHIPS, GAP, MODELS, RAMP, Chip, Group
from t2kernels.files import write_text
from t2kernels.triton.tuning import TABLES, Tile

LATENCY = 0.8e-6  # seconds from a load to its data while memory is busy
ROWS = 16  # every table has one tile for all batches up to this
ENTRY_BYTES = 2  # bfloat16
SLICES = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Multiprocessors:
    """Those of a chip: their number, and what each has for its programs."""

    table: str
    count: int
    shared_bytes: int
    registers: int = 65536
    reserved_bytes: int = 1024  # of shared memory, for each program


PROCESSORS = {
    "A100": Multiprocessors("sm_80", 108, 164 << 10),
    "H100": Multiprocessors("sm_90", 132, 228 << 10),
    "H200": Multiprocessors("sm_90", 132, 228 << 10),
    "B200": Multiprocessors("sm_100", 148, 228 << 10),
}


@dataclass(frozen=True)
class Fill:
    """One launch of a decode step."""

    chip: str
    layers: str
    step: str
    tiles: int
    busy: float  # of the multiprocessors, in the first wave
    under_way_kb: float  # in the first wave
    wanted_kb: float  # bandwidth x latency
    us: float
    at_bandwidth_us: float
    slices: int  # at which split-K saves most; 1: at none
    split_saves_us: float  # before the launch that adds the slices' sums


def layers() -> Iterator[tuple[str, Group]]:
    """The groups that a model runs as one launch, and those of their layers alone that have few columns."""
    for name in ("SmolLM2-135M", "Llama-3-8B", "Llama-3-70B"):
        model = MODELS[name]
        for group in model.groups:
            yield f"{name} {group.name}", group
        yield f"{name} k alone", Group("k", model.hidden, (model.kv,))


def resident(chip: str, step: str, tile: Tile) -> int:
    """Programs of a tile that run side by side on one multiprocessor."""
    own = PROCESSORS[chip]
    label = f"{tile.block_m} x {tile.block_n} x {tile.block_k}, {tile.warps} warps, {tile.stages} stages"
    wanted = (own.table, step, "bfloat16", label)
    found = [
        each
        for each in read("triton-compile.json")["launches"]
        if (each["chip"], each["step"], each["factors"], each["tile"]) == wanted
    ]
    if not found:
        raise ValueError(f"triton-compile.json: expected a launch {wanted}, got none; run benchmarks/triton_compile.py")
    shared, registers = (max(each[name] for each in found) for name in ("shared_bytes", "registers"))
    by_shared = own.shared_bytes // (shared + own.reserved_bytes)
    return min(by_shared, own.registers // (registers * 32 * tile.warps))


def seconds(work: list[int], at_once: int, tile: Tile, chip: Chip) -> float:
    """work: the steps of every tile, in the order in which they start."""
    step_bytes = tile.block_n * tile.block_k * ENTRY_BYTES
    total = 0.0
    for first in range(0, len(work), at_once):
        wave = work[first : first + at_once]
        moved = sum(wave) * step_bytes / (BANDWIDTH_SHARE * chip.bandwidth)
        total += max(moved, LATENCY * max(1.0, max(wave) / (tile.stages - 1)))
    return total


def fill(chip: Chip, name: str, group: Group, step: str) -> Fill:
    own = PROCESSORS[chip.name]
    tile = next(tile for most, tile in TABLES[own.table].entries(step, "half") if most >= ROWS)
    if step == "project":
        shapes = [(rank, group.inputs) for rank in group.ranks]
    else:
        shapes = list(zip(group.outs, group.ranks, strict=True))
    work = [math.ceil(k / tile.block_k) for n, k in shapes for _ in range(math.ceil(n / tile.block_n))]
    at_once = own.count * resident(chip.name, step, tile)
    whole = seconds(work, at_once, tile, chip)
    split = {
        count: seconds([math.ceil(steps / count) for steps in work for _ in range(count)], at_once, tile, chip)
        for count in (1, *SLICES)
    }
    best = min(split, key=lambda count: split[count])
    first = work[:at_once]
    step_bytes = tile.block_n * tile.block_k * ENTRY_BYTES
    return Fill(
        chip.name,
        name,
        step,
        len(work),
        min(1.0, len(work) / own.count),
        sum(min(steps, tile.stages - 1) for steps in first) * step_bytes / 1e3,
        BANDWIDTH_SHARE * chip.bandwidth * LATENCY / 1e3,
        round(whole * 1e6, 3),
        round(sum(n * k for n, k in shapes) * ENTRY_BYTES / (BANDWIDTH_SHARE * chip.bandwidth) * 1e6, 3),
        best,
        round((whole - split[best]) * 1e6, 3),
    )


def results() -> dict[str, Any]:
    return {
        "what": "predictions from data sheets and compiled code, not measurements",
        "assumptions": {
            "latency_us": LATENCY * 1e6,
            "bandwidth_share": BANDWIDTH_SHARE,
            "launch_us": (GAP + RAMP) * 1e6,
            "rows": ROWS,
        },
        "processors": {name: asdict(own) for name, own in PROCESSORS.items()},
        "launches": [
            asdict(fill(chip, name, group, step))
            for chip in CHIPS.values()
            for name, group in layers()
            for step in ("project", "expand")
        ],
    }


def figures() -> str:
    return json.dumps(results(), indent=1) + "\n"


if __name__ == "__main__":
    write_text(RESULTS / "fill.json", figures())
