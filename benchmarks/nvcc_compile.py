"""The CUDA decode kernel compiled by nvcc for every target: no GPU needed.

    python benchmarks/nvcc_compile.py [--out benchmarks/results/nvcc-compile.json]

`-Xptxas -v` says what registers, stack, spills and shared memory each kernel takes; cuobjdump (of nvcc's folder, of the
search path, or of a Python package that carries one with nvdisasm) shows the instructions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from t2kernels.files import write_text  # noqa: E402

SOURCE = ROOT / "csrc" / "cuda" / "decode.cu"
TARGETS = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}


@dataclass(frozen=True)
class Variant:
    """What one instance of the kernel template is for, and must be."""

    rows: str
    most_registers: int  # of 65,536 for as many blocks of 256 threads as decode.cuh wants on a multiprocessor
    least_wide_loads: int  # a lane's ring, filled once and refilled for each of three storages


VARIANTS = {
    "decodeILi1ELi1E": Variant("1 to 8", 65536 // (2 * 256), 4 * 8),
    "decodeILi2ELi2E": Variant("9 to 16", 255, 4 * 16),
}


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel, in bytes but for the registers."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Instructions:
    """How often a kernel's machine code has them."""

    wide_loads: int  # 128 bits past L1: weights
    tensor_core: int  # HMMA.16816.F32.BF16
    local_memory: int


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm; both have to be in one folder."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    for package, pattern in (("triton", "backends/nvidia/bin"), ("nvidia", "cu*/bin")):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations if spec else None) or []:
            folders += sorted(Path(location).glob(pattern))
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def compile_for(target: str, folder: Path) -> tuple[Path, str]:
    """The object file, and what the compilers said. nvcc has to be on the search path."""
    made = folder / f"{target}.o"
    command = ["nvcc", "-c", "-std=c++20", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra"]
    command += ["-gencode", f"arch={TARGETS[target]},code={target}", "-o", str(made), str(SOURCE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return made, done.stdout + done.stderr


def by_variant(text: str, heading: str) -> dict[str, str]:
    """The section of each variant in a report whose sections start with `heading` and the kernel's mangled name."""
    sections = text.split(heading)[1:]
    found = {name: section for section in sections for name in VARIANTS if name in section.splitlines()[0]}
    if len(sections) != len(VARIANTS) or set(found) != set(VARIANTS):
        raise ValueError(f"expected one section {heading!r} for each of {list(VARIANTS)}, got {len(sections)}:\n{text}")
    return found


def usages(report: str) -> dict[str, Usage]:
    """By variant, from what `compile_for` returns."""

    def number(pattern: str, section: str) -> int:
        found = re.search(pattern, section)
        return int(found[1]) if found else 0

    def usage(section: str) -> Usage:
        patterns = (r"bytes stack frame", r"bytes spill stores", r"bytes spill loads", r"bytes smem")
        return Usage(number(r"Used (\d+) registers", section), *(number(rf"(\d+) {p}", section) for p in patterns))

    return {name: usage(section) for name, section in by_variant(report, "Compiling entry function").items()}


def instructions(compiled: Path) -> dict[str, Instructions]:
    """By variant, from an object file's machine code."""
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("expected cuobjdump in nvcc's folder, on the path or in the triton package, found none")
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    command = [cuobjdump, "-sass", str(compiled)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PATH": path})

    def count(section: str) -> Instructions:
        patterns = (r"LDG\.E\.NA\S*\.128\S*", r"HMMA\.16816\.F32\.BF16", r"\b(?:LDL|STL)\b")
        return Instructions(*(len(re.findall(pattern, section)) for pattern in patterns))

    return {name: count(section) for name, section in by_variant(done.stdout, "Function : ").items()}


def problems(variant: Variant, usage: Usage, code: Instructions) -> list[str]:
    found = []
    if usage.registers > variant.most_registers:
        found.append(f"{usage.registers} registers, {variant.most_registers} there are")
    if usage.stack + usage.spill_stores + usage.spill_loads + code.local_memory:
        found.append("stack, spills or local memory")
    if code.wide_loads < variant.least_wide_loads:
        found.append(f"{code.wide_loads} loads of 128 bits, expected {variant.least_wide_loads} or more")
    if not code.tensor_core:
        found.append("no HMMA.16816.F32.BF16")
    return found


def main(out: Path = ROOT / "benchmarks" / "results" / "nvcc-compile.json") -> None:
    """Args:
    out: the JSON file.
    """
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc_compile: expected nvcc on the search path, found none")
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"\bV([\d.]+)", said)
    if release is None:
        raise SystemExit(f"nvcc_compile: expected a version like V13.0.88 from nvcc --version, got {said!r}")
    kernels, failed = [], 0
    table = Table(
        "target", "rows", *(field.replace("_", " ") for kind in (Usage, Instructions) for field in kind.__annotations__)
    )
    table.add_column("problem")
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            made, report = compile_for(target, Path(folder))
            if "warning" in report:
                raise SystemExit(f"nvcc_compile: expected no warnings for {target}, got\n{report}")
            used, code = usages(report), instructions(made)
            for name, variant in VARIANTS.items():
                figures = {**asdict(used[name]), **asdict(code[name])}
                wrong = problems(variant, used[name], code[name])
                failed += bool(wrong)
                kernels.append({"target": target, "rows": variant.rows, **figures})
                table.add_row(target, variant.rows, *map(str, figures.values()), "; ".join(wrong))
    Console(width=160).print(table)
    write_text(out, json.dumps({"nvcc": release[1], "kernels": kernels}, indent=1) + "\n")
    print(f"{len(kernels)} kernels of nvcc {release[1]}, {failed} with a problem; wrote {out}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    tyro.cli(main)
