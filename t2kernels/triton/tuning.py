"""Tile sizes: a table per kind of chip, and what `tune` measured on this one.

A table names tiles by the rows they are for. Along a table one kind of tensor core instruction does the sums (mma on
sm_80, wgmma on sm_90 and tcgen05 on sm_100 from 64 rows of the left operand on, mfma on gfx942), since a row's bits may
not depend on how many others are there.

For few rows, reading the weights is all there is to do, and what counts are bytes in flight: memory that delivers
4.3 TB/s after 0.8 us wants 26 KB of them on each of 132 SMs. A tile has `stages - 1` steps of its weights in flight,
block_n x block_k entries each; of x only rows that exist are read. Launches with more tiles than SMs want shallow
buffers, so that several programs share an SM; the others deep ones. Tables can't tell the two apart: measured tiles do,
those of `measured/` for the GPUs and shapes they were measured on, and what `tune` adds.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from t2kernels.files import cache_root, strict_json, write_text


@dataclass(frozen=True)
class Tile:
    """The tiling of one launch: rows x columns of a program's tile, the step along k, warps, buffers in flight.

    `group_m` row tiles take turns before the next columns. A persistent launch has as many programs as the chip has
    SMs, each walking over tiles. `weights_first`: weights are the left operand of the tensor core, whose tile has at
    least 64 rows on Hopper, so that few rows of x need no padding and 8-bit weights come from registers. `prefetch`
    lines of 128 bytes of each weight row are asked for before anything else; with `overlap` a launch begins while the
    one before it still runs (programmatic dependent launch, Hopper and later).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    persistent: bool = False
    weights_first: bool = False
    prefetch: int = 0
    overlap: bool = False


SHIPPED = Path(__file__).parent / "measured"
Entries = tuple[tuple[float, Tile], ...]


@dataclass(frozen=True)
class Table:
    """Tiles by the largest number of rows they are for; the last takes all others."""

    project: Entries  # products of 16-bit terms, by step: scales and sums at their end take registers
    expand: Entries
    pull: Entries
    split: Entries  # project and expand with float16 weights, or a head of them, as two bfloat16 ones: sums take twice
    wide: Entries  # products of float32 and tf32 terms
    words: Entries  # project and expand with int8 weights
    wide_words: Entries  # the same with float32 and tf32 terms
    back: Entries | None = None  # default: expand's

    def entries(self, step: str, terms: str) -> Entries:
        """step: project, expand, pull or back (dx); terms: half, words, split, wide or wide words."""
        forward = step in ("project", "expand")
        if terms in ("wide", "wide words"):
            return self.wide_words if forward and terms == "wide words" else self.wide
        if terms == "split" and step != "pull":
            return self.split
        if forward and terms == "words":
            return self.words
        back = self.expand if self.back is None else self.back
        return {"project": self.project, "expand": self.expand, "pull": self.pull, "back": back}[step]


_MMA_WIDE = ((16, Tile(16, 32, 64, 4, 3)), (math.inf, Tile(64, 32, 32, 4, 3)))
_MFMA = ((16, Tile(16, 32, 128, 4, 2)), (64, Tile(64, 64, 64, 4, 2)), (math.inf, Tile(128, 128, 64, 8, 2)))
_WIDE = ((math.inf, Tile(64, 32, 32, 4, 3)),)
_MMA_WIDE_WORDS = ((math.inf, Tile(16, 32, 256, 4, 2)),)
_WIDE_WORDS = ((math.inf, Tile(64, 32, 256, 4, 2)),)


def _hopper_decode(block_k: int, stages: int, stages_of_64: int) -> Entries:
    """Up to 64 rows: reading weights is all there is to do."""

    def tile(rows: int, stages: int) -> Tile:
        return Tile(rows, 64, block_k, 4, stages, weights_first=True, prefetch=2, overlap=True)

    return (16, tile(16, stages)), (32, tile(32, stages)), (64, tile(64, stages_of_64))


TABLES = {
    "sm_80": Table(
        project=(
            (16, Tile(16, 32, 128, 4, 5)),
            (64, Tile(64, 64, 64, 4, 4)),
            (math.inf, Tile(128, 128, 32, 8, 4)),
        ),
        pull=((16, Tile(16, 32, 128, 4, 5)), (math.inf, Tile(128, 64, 32, 8, 4))),
        expand=(
            (16, Tile(16, 32, 128, 4, 5)),
            (64, Tile(64, 64, 64, 8, 4)),
            (math.inf, Tile(128, 128, 32, 8, 4)),
        ),
        split=(
            (16, Tile(16, 32, 128, 4, 5)),
            (64, Tile(64, 64, 32, 4, 4)),
            (math.inf, Tile(128, 128, 32, 8, 4)),
        ),
        wide=_MMA_WIDE,
        words=(
            (16, Tile(16, 32, 256, 4, 3, weights_first=True)),
            (64, Tile(64, 64, 256, 4, 2, weights_first=True)),
            (math.inf, Tile(64, 128, 256, 8, 2, weights_first=True)),
        ),
        wide_words=_MMA_WIDE_WORDS,
    ),
    "sm_90": Table(
        project=(
            *_hopper_decode(128, 6, 5),
            (256, Tile(128, 64, 64, 4, 5, weights_first=True)),
            (math.inf, Tile(256, 128, 64, 8, 3, persistent=True, weights_first=True)),
        ),
        pull=((256, Tile(64, 128, 64, 8, 4)), (math.inf, Tile(128, 64, 64, 8, 4))),
        expand=(
            *_hopper_decode(128, 6, 5),
            (256, Tile(128, 64, 64, 4, 5, weights_first=True)),
            (math.inf, Tile(128, 256, 64, 8, 3, persistent=True)),
        ),
        split=(
            (64, Tile(64, 32, 128, 4, 8)),
            (256, Tile(64, 128, 64, 8, 4)),
            (math.inf, Tile(128, 128, 64, 8, 3)),
        ),
        wide=_WIDE,
        words=(
            *_hopper_decode(256, 4, 3),
            (math.inf, Tile(128, 128, 256, 8, 2, weights_first=True)),
        ),
        wide_words=_WIDE_WORDS,
        back=(
            (64, Tile(64, 32, 128, 4, 6)),
            (256, Tile(64, 128, 64, 4, 4)),
            (math.inf, Tile(128, 256, 64, 8, 3, persistent=True)),
        ),
    ),
    "sm_100": Table(
        project=(
            (64, Tile(64, 32, 128, 4, 8)),
            (128, Tile(128, 32, 128, 4, 4)),
            (math.inf, Tile(128, 128, 64, 8, 3)),
        ),
        expand=(
            (64, Tile(64, 32, 128, 4, 8)),
            (128, Tile(128, 32, 64, 8, 4)),
            (math.inf, Tile(128, 256, 64, 8, 3, persistent=True)),
        ),
        pull=((math.inf, Tile(128, 64, 64, 8, 4)),),
        split=(
            (64, Tile(64, 32, 128, 4, 8)),
            (128, Tile(128, 32, 64, 8, 4)),
            (math.inf, Tile(128, 128, 64, 8, 3)),
        ),
        wide=_WIDE,
        words=(
            (64, Tile(64, 64, 256, 4, 3)),
            (math.inf, Tile(128, 128, 256, 8, 2)),
        ),
        wide_words=_WIDE_WORDS,
        back=(
            (64, Tile(64, 32, 128, 4, 6)),
            (128, Tile(128, 32, 64, 8, 4)),
            (math.inf, Tile(128, 256, 64, 8, 3, persistent=True)),
        ),
    ),
    "gfx942": Table(
        project=_MFMA,
        expand=_MFMA,
        pull=_MFMA,
        split=_MFMA,
        wide=_MMA_WIDE,
        words=((16, Tile(16, 32, 256, 4, 2)), (math.inf, Tile(64, 64, 256, 4, 2))),
        wide_words=_MMA_WIDE_WORDS,
    ),
}


@functools.cache
def chip(device: torch.device) -> str:
    """The table that fits a device; the interpreter on the CPU uses sm_90's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100" if major == 10 else "sm_80")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent launch; the interpreter has a few, so that each walks over several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@dataclass(frozen=True)
class Launch:
    """The key that a tile is chosen by."""

    step: str  # project, expand, pull or back
    rows: int
    columns: tuple[int, ...]
    k: tuple[int, ...]
    terms: str  # half, words, split, wide or wide words: see Table
    dtypes: tuple[torch.dtype, ...]  # of the left side and the weights

    @property
    def key(self) -> str:
        """Launches whose rows round up to the same power of two share a measured tile."""
        bucket = 1 << max(0, self.rows - 1).bit_length()
        dtypes = " x ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{self.step} rows<={bucket} columns={self.columns} k={self.k} {dtypes}"


_chosen: dict[tuple[Launch, torch.device], Tile] = {}
_generation = itertools.count()
_current = next(_generation)


def generation() -> int:
    """Another number whenever tiles have changed: launches that were prepared before are out of date."""
    return _current


def _change() -> None:
    global _current
    _current = next(_generation)


def tile_for(launch: Launch, device: torch.device) -> Tile:
    """The measured tile if there is one, else the table's; looked up once for each launch."""
    tile = _chosen.get((launch, device))
    if tile is None:
        tile = _chosen[launch, device] = _measured(_path(device)).get(launch.key) or table_tile(launch, device)
    return tile


def table_tile(launch: Launch, device: torch.device) -> Tile:
    entries = TABLES[chip(device)].entries(launch.step, launch.terms)
    return next(tile for most, tile in entries if launch.rows <= most)


def tune(
    run: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float], device: torch.device
) -> dict[str, Tile]:
    """Tries tiles for every launch that `run` makes, one launch after the other, and keeps the fastest on disk.

    seconds: times a call. A tile that does not compile or does not fit this chip is passed over.
    """
    _chosen.clear()
    _change()
    run()
    best = {}
    for launch in [launch for launch, _ in _chosen]:
        times: dict[Tile, float] = {}
        for tile in candidates(launch, device):
            _chosen[launch, device] = tile
            _change()
            try:
                times[tile] = seconds(run)
            except (OutOfResources, CompilationError, PTXASError):
                continue
        best[launch.key] = _chosen[launch, device] = min(times, key=lambda tile: times[tile])
        _change()
        save({launch.key: best[launch.key]}, device)
    return best


def candidates(launch: Launch, device: torch.device) -> list[Tile]:
    """Tiles to try: the table's, and the same with other depths, widths and numbers of buffers."""
    base = table_tile(launch, device)
    tiles = {base}
    for block_n in (16, 32, 64, 128, 256):
        for block_k in (32, 64, 128, 256):
            for stages in (3, 5, 8):
                if base.block_m * block_n <= 1 << 15 and (base.block_m + block_n) * block_k * stages * 2 <= 200 << 10:
                    warps = 8 if base.block_m * block_n >= 1 << 14 else 4
                    tiles.add(Tile(base.block_m, block_n, block_k, warps, stages, base.group_m, base.persistent))
    return sorted(tiles, key=lambda tile: tuple(asdict(tile).values()))


def save(measured: dict[str, Tile], device: torch.device) -> Path:
    """Adds measured tiles to the device's file, whole or not at all, and uses them from now on."""
    path = _path(device)
    merged = {**_measured(path), **measured}
    write_text(path, json.dumps({key: asdict(tile) for key, tile in sorted(merged.items())}, indent=1))
    _measured.cache_clear()
    _chosen.clear()
    _change()
    return path


@functools.cache
def _measured(path: Path) -> dict[str, Tile]:
    """The tiles measured on this machine, and those that ship for its GPU."""
    found: dict[str, Tile] = {}
    for each in (SHIPPED / path.name, path):
        try:
            found |= {key: _tile(key, values) for key, values in strict_json(each.read_bytes()).items()}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, AttributeError) as error:
            text = f"measured tiles {each} are damaged and not used; tune measures them anew ({error})"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return found


def _tile(key: str, values: Any) -> Tile:
    """A tile from its JSON; TypeError or ValueError where a field is missing, unknown or no tile's."""
    tile = Tile(**values)
    for name, most in (("block_m", 512), ("block_n", 512), ("block_k", 1024), ("warps", 32)):
        size = getattr(tile, name)
        if type(size) is not int or not 1 <= size <= most or size & (size - 1):
            raise ValueError(f"{key}: {name}: expected a power of two up to {most}, got {size!r:.40}")
    for name, least, most in (("stages", 1, 32), ("group_m", 1, 1 << 16), ("prefetch", 0, 1 << 16)):
        count = getattr(tile, name)
        if type(count) is not int or not least <= count <= most:
            raise ValueError(f"{key}: {name}: expected an integer from {least} to {most}, got {count!r:.40}")
    for name in ("persistent", "weights_first", "overlap"):
        if type(getattr(tile, name)) is not bool:
            raise ValueError(f"{key}: {name}: expected true or false, got {getattr(tile, name)!r:.40}")
    return tile


def _path(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return cache_root() / "tuning" / f"{name.replace(' ', '-')}.json"
