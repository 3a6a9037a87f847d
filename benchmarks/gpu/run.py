"""Tests and timings on a GPU, stage by stage, without a network.

    python -m benchmarks.gpu.run --out DIR [--stages environment,correct+tests,kernels] [--seconds 420]
    python -m benchmarks.gpu.run --out DIR --smoke       # tiny sizes on the CPU: a test of this program

Each stage is a process with a time limit of its own; one that fails or hangs leaves the others as they are. Stages
joined by "+", none of which measures time, run side by side. DIR gets results.json (each measurement as it comes; those
already there are kept, errors are measured again), tables.md, log.txt and tests.txt. Needs torch, Triton and
transformers, and for some stages peft, pytest, pytest-xdist and pytest-timeout.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the parent must not start CUDA: its forks use it

import torch

from benchmarks.gpu.harness import Results
from benchmarks.gpu.report import report

Measure = Callable[[Results, torch.device, bool], None]


@dataclass(frozen=True)
class Stage:
    """Function in a module of this package, and the seconds it may take."""

    module: str
    seconds: int
    default: bool = True
    function: str = "measure"


STAGES = {
    "environment": Stage("environment", 30),
    "correct": Stage("correctness", 60),
    "tests": Stage("pytest_gpu", 130),
    "kernels": Stage("kernels", 120),
    "end_to_end": Stage("end_to_end", 220),
    "peft": Stage("peft_mixed_batch", 90),
    "rl_step": Stage("rl_step", 75),
    "generate": Stage("compiled_generate", 60),
    "compile": Stage("tile_search", 90, default=False, function="compile_stage"),
    "tiles": Stage("tile_search", 200, default=False),
    "sanitizer": Stage("sanitizer", 90, default=False),
    "counters": Stage("nsight", 60, default=False),
}


class Running:
    """A stage's `measure` in a fork; its output goes to out/log.txt and the terminal."""

    def __init__(self, name: str, out: Path, results: Path, smoke: bool, seconds: float) -> None:
        self.deadline, self.log, self.ended = time.monotonic() + seconds, out / "log.txt", ""
        self._reader, writer = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.setsid()
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1) for each in (1, 2))
            _measure(STAGES[name], results, smoke)
        os.close(writer)
        os.set_blocking(self._reader, False)
        self._copy(f"== {name}\n".encode())

    def poll(self) -> None:
        """Sets `ended` to ok, failed or timeout once it has ended; a stage past its time is killed."""
        done, status = os.waitpid(self._child, os.WNOHANG)
        if done:
            self.ended = "ok" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        elif time.monotonic() > self.deadline:
            os.killpg(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self.ended = "timeout"
        while True:
            try:
                text = os.read(self._reader, 1 << 16)
            except BlockingIOError:
                break
            if not text:
                break
            self._copy(text)
        if self.ended:
            os.close(self._reader)

    def _copy(self, text: bytes) -> None:
        with self.log.open("ab") as log:
            log.write(text)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def _measure(stage: Stage, results: Path, smoke: bool) -> NoReturn:
    status = 1
    try:
        measure: Measure = getattr(importlib.import_module(f"benchmarks.gpu.{stage.module}"), stage.function)
        measure(Results(results), torch.device("cpu" if smoke else "cuda"), smoke)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def side_by_side(names: Sequence[str], out: Path, smoke: bool, seconds: float) -> dict[str, str]:
    """Runs these stages side by side; returns "ok", "failed" or "timeout" of each. Several write to own files first."""
    whole = out / "results.json"
    paths = {name: whole if len(names) == 1 else out / f".{name}.json" for name in names}
    for path in paths.values():
        if path != whole:
            path.write_text(whole.read_text() if whole.exists() else "{}")
    running = {
        name: Running(name, out, path, smoke, min(seconds, STAGES[name].seconds)) for name, path in paths.items()
    }
    while unfinished := [each for each in running.values() if not each.ended]:
        for each in unfinished:
            each.poll()
        time.sleep(0.05)
    results = Results(whole)
    for path in paths.values():
        if path != whole:
            results.data |= json.loads(path.read_text())
            path.unlink()
    results.put("ended", [*results.data.get("ended", []), *names])
    return {name: each.ended for name, each in running.items()}


def pack_cache(cache: Path, target: Path) -> None:
    """Archives kernels and metadata of Triton's cache, to be unpacked at the same path elsewhere."""
    with tarfile.open(target, "w:xz", preset=1) as archive:
        for file in sorted(cache.rglob("*")):
            if file.suffix in (".json", ".cubin", ".so"):
                archive.add(file, file.relative_to(cache))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default=",".join(n for n, s in STAGES.items() if s.default))
    parser.add_argument("--seconds", type=float, default=600.0, help="stages that would end later are skipped")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--pack-cache", action="store_true", help="leave Triton's cache as DIR/triton-cache.tar.xz")
    options = parser.parse_args()
    names = [name for name in options.stages.split(",") if name]
    if unknown := {name for joined in names for name in joined.split("+")} - set(STAGES):
        parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if not options.smoke and torch.version.cuda is None:
        raise SystemExit(f"benchmarks.gpu.run: expected a torch built with CUDA, got {torch.__version__}")
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    results, failed = options.out / "results.json", []
    for module in ("transformers", "t2.model.svf_model", "t2kernels.triton.launch"):  # imported once, for all forks
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{module}: {error}", flush=True)
    print(f"imports {time.monotonic() - begin:.1f} s, Python {platform.python_version()}", flush=True)
    for joined in names:
        left = options.seconds - (time.monotonic() - begin)
        if left < 5:
            print(f"{joined}: skipped, {left:.0f} s left", flush=True)
            continue
        start = time.monotonic()
        ended = side_by_side(joined.split("+"), options.out, options.smoke, left)
        for name, how in ended.items():
            Results(results).put(f"stage | {name}", {"ended": how, "took": round(time.monotonic() - start, 1)})
        failed += [name for name, how in ended.items() if how != "ok"]
        (options.out / "tables.md").write_text(report(json.loads(results.read_text())))
    if options.pack_cache and (cache := os.environ.get("TRITON_CACHE_DIR")):
        pack_cache(Path(cache), options.out / "triton-cache.tar.xz")
    print((options.out / "tables.md").read_text(), flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
