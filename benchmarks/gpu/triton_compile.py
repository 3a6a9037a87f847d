"""Machine code of every tile in the tuning tables, compiled for its chip without a GPU.

    python -m benchmarks.gpu.triton_compile [--some] --out FILE

The launches are those that `t2kernels.triton.launch` makes (see `benchmarks.gpu.compile_only`). Read from the machine
code: registers, spills to local memory, shared memory, and the tensor core instructions of the products. x is bfloat16,
or float32 with float32 factors; int8 is compiled with the leading components in float16, like factors, and without
them, like dense weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks.common.tables import write_results
from benchmarks.gpu.compile_only import SM_90, compiling, using_tile
from t2kernels.packing import interleave
from t2kernels.triton import launch, tuning
from t2kernels.triton.tuning import TABLES, Tile
from t2kernels.weights import float16_rank

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": SM_90,
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
SPILLED_BYTES = 512
"""Most bytes a thread may spill. The fastest prefill tile on an H200 spills 488 under Triton 3.9."""
TENSOR_CORE = {  # instructions of 16-bit products
    "sm_80": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "gfx942": "v_mfma",
}
STEPS = ("project", "expand", "pull", "back")
HEAD = "int8, float16 head"
STORAGE = {
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    HEAD: torch.int8,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Compiled:
    """One launch as machine code."""

    chip: str
    step: str
    factors: str
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: str

    @property
    def problems(self) -> list[str]:
        found = []
        if self.spilled_bytes > SPILLED_BYTES:
            found.append(f"{self.spilled_bytes} bytes spilled")
        if self.shared_bytes > SHARED_BYTES[self.chip]:
            found.append(f"{self.shared_bytes} bytes of shared memory, {SHARED_BYTES[self.chip]} there are")
        if self.factors != "float32" and TENSOR_CORE[self.chip] not in self.tensor_core:
            found.append(f"no {TENSOR_CORE[self.chip]}")
        return found


def step_of(options: dict[str, Any]) -> str:
    """Step of a launch by its constants; "gather" has no tile."""
    if "NEED_D" in options:
        return "pull"
    if options.get("TRANSPOSED"):
        return "back"
    if "HAS_SCALES" not in options:
        return "gather"
    return "project" if options["HAS_SCALES"] else "expand"


def launches(factors: str, tile: Tile) -> None:
    """The launches of a forward and a backward pass of one layer, and of q, k and v together, as in Llama-3-8B.

    The two parts of k and v in int8 are multiples of 32 only, so wider steps along their rank have to be masked.
    """
    rows, features, storage = 2 * tile.block_m, 4096, STORAGE[factors]
    x = torch.zeros(rows, features, dtype=torch.float32 if storage == torch.float32 else torch.bfloat16)
    scales, slots = torch.ones(4, features), torch.zeros(rows, dtype=torch.int64)

    def parts(n: int) -> tuple[list[Tensor], list[Tensor]]:
        """Parts of U and Vh of rank n."""
        head = float16_rank(n) if factors == HEAD else 0
        kinds = [(rank, dtype) for rank, dtype in ((head, torch.float16), (n - head, storage)) if rank]
        u = [zeros(n, rank, dtype) for rank, dtype in kinds]
        return u, [zeros(rank, features, dtype) for rank, dtype in kinds]

    group = [features, 1024, 1024]
    us, vhs = ([part for own in each for part in own] for each in zip(*(parts(n) for n in group), strict=True))
    components = [torch.ones(n) for n in group] if storage == torch.int8 else []
    launch.factored_linear_group(x, us, vhs, components, [scales[:, :n] for n in group], slots, [], group, False)
    u, vh = parts(features)
    component = torch.ones(features) if storage == torch.int8 else None
    _, t = launch.factored_linear(x, u, vh, component, scales, slots, None, features, False)
    launch.factored_linear_backward(x, t, u, vh, component, scales, slots, features, True, True, False)


def zeros(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Matrix in the GPU's layout."""
    matrix = torch.zeros(n, k, dtype=dtype)
    return interleave(matrix) if dtype == torch.int8 else matrix


def tool(name: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / name)


def read_nvidia(compiled: Any) -> tuple[int, int, str]:
    """(registers, bytes of stack and local memory, instructions of products)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout
    spilled = max(int(found[2]) + int(found[3]), 4 * len(re.findall(r"\bSTL\b", sass)))
    names = re.findall(r"\b(HMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|FFMA)\b", sass)
    return int(found[1]), spilled, " ".join(sorted(set(names)))


def read_amd(compiled: Any) -> tuple[int, int, str]:
    assembly = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    assert registers is not None and spilled is not None
    return int(registers[1]), int(spilled[1]), " ".join(sorted(set(re.findall(r"v_mfma_\w+", assembly))))


def tiles() -> Iterator[tuple[str, Tile, tuple[str, ...], tuple[str, ...]]]:
    """Every tile of the tables: its chip, the steps it is for, and kinds of factors."""
    for chip, table in tuning.TABLES.items():
        for step in STEPS:
            forward = step in ("project", "expand")
            for _, tile in table.entries(step, "half"):
                yield chip, tile, (step,), ("bfloat16",) if forward else ("bfloat16", "int8")
            for _, tile in table.entries(step, "split"):
                yield chip, tile, (step,), ("float16",)
            for _, tile in table.words if forward else ():
                yield chip, tile, (step,), ("int8", HEAD)
        for _, tile in table.wide:
            yield chip, tile, STEPS, ("float32",)


def compile_all(some: bool) -> list[Compiled]:
    """Every tile with its formats; or `some`: each chip's first, and its first for int8."""
    wanted = list(dict.fromkeys(tiles()))
    if some:
        firsts = (next(entry for entry in wanted if entry[0] == chip) for chip in TARGETS)
        wanted = [*firsts, *((c, TABLES[c].words[0][1], ("expand",), (HEAD,)) for c in TARGETS)]
    found: dict[str, Compiled] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for made in tqdm(pool.map(compile_tile, *zip(*wanted, strict=True)), desc="tiles", total=len(wanted)):
            found |= {code: each for code, each in made.items() if code not in found}
    return list(found.values())


def compile_tile(chip: str, tile: Tile, only: tuple[str, ...], kinds: tuple[str, ...]) -> dict[str, Compiled]:
    """Machine code of a tile's launches, by its hash."""
    read = read_nvidia if TARGETS[chip].backend == "cuda" else read_amd
    label = f"{tile.block_m} x {tile.block_n} x {tile.block_k}, {tile.warps} warps, {tile.stages} stages"
    found = {}
    for factors in kinds:
        wanted = lambda options: step_of(options) in only  # noqa: E731
        device = list(TARGETS).index(chip)
        with compiling(TARGETS[chip], device, wanted) as made, using_tile(tile):
            launches(factors, tile)
        for kernel_options, compiled in made:
            step = step_of(kernel_options)
            if compiled.hash not in found:
                registers, spilled, tensor_core = read(compiled)
                shared = compiled.metadata.shared
                found[compiled.hash] = Compiled(chip, step, factors, label, registers, spilled, shared, tensor_core)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--some", action="store_true", help="two tiles for each chip")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = parser.parse_args()
    compiled = compile_all(options.some)
    for each in compiled:
        if each.problems:
            print(f"{each}: {'; '.join(each.problems)}")
    write_results(options.out, {"triton": triton.__version__, "launches": [asdict(each) for each in compiled]})
    problems = sum(bool(each.problems) for each in compiled)
    print(f"{len(compiled)} launches of Triton {triton.__version__}, {problems} with a problem; wrote {options.out}")
    raise SystemExit(problems > 0)


if __name__ == "__main__":
    main()
