"""What a GPU has to say about these kernels, stage by stage, without a network.

    python benchmarks/gpu/run.py --out DIR [--stages environment,correct,tests,kernels] [--seconds 420]
    python benchmarks/gpu/run.py --out DIR --smoke       # tiny sizes on the CPU: a test of this program

Each stage is a process with a time limit of its own; one that fails or hangs leaves the others as they are. DIR gets
results.json (every figure as it comes; figures already there are kept, errors are measured again), tables.md, log.txt
and tests.txt. Needs torch, Triton and transformers, and for some stages peft, pytest, pytest-xdist and pytest-timeout.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the parent must not start CUDA: its forks use it

import torch  # noqa: E402

from benchmarks.gpu import tables  # noqa: E402
from benchmarks.gpu.common import Results  # noqa: E402

Measure = Callable[[Results, torch.device, bool], None]


@dataclass(frozen=True)
class Stage:
    """A module of this package that has `measure`, and the seconds it may take."""

    module: str
    seconds: int
    default: bool = True


STAGES = {
    "environment": Stage("environment", 30),
    "correct": Stage("correct", 60),
    "tests": Stage("suite", 130),
    "kernels": Stage("kernels", 120),
    "end_to_end": Stage("end_to_end", 220),
    "peft": Stage("peft_mixed", 90),
    "rl_step": Stage("rl_step", 75),
    "generate": Stage("generate", 60),
    "compile": Stage("ahead_of_time", 90, default=False),
    "tiles": Stage("tiles", 200, default=False),
    "sanitizer": Stage("sanitizer", 60, default=False),
}


def run_stage(name: str, stage: Stage, out: Path, smoke: bool, seconds: float) -> str:
    """ok, failed or timeout: the stage's `measure` in a fork, its output to out/log.txt and the terminal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            measure: Measure = importlib.import_module(f"benchmarks.gpu.{stage.module}").measure
            measure(Results(out / "results.json"), torch.device("cpu" if smoke else "cuda"), smoke)
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    deadline, ended = time.monotonic() + seconds, "timeout"
    with (out / "log.txt").open("ab") as log:
        os.set_blocking(reader, False)
        log.write(f"== {name}\n".encode())
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            _copy(reader, log)
            if done:
                ended = "ok" if os.waitstatus_to_exitcode(status) == 0 else "failed"
                break
            time.sleep(0.05)
        else:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        _copy(reader, log)
    os.close(reader)
    return ended


def _copy(reader: int, log: Any) -> None:
    while True:
        try:
            text = os.read(reader, 1 << 16)
        except BlockingIOError:
            return
        if not text:
            return
        log.write(text)
        log.flush()
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def pack_cache(cache: Path, target: Path) -> None:
    """What travels of Triton's cache: kernels and their metadata, to be unpacked at the same path."""
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
    if unknown := set(names) - set(STAGES):
        parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if not options.smoke and torch.version.cuda is None:
        raise SystemExit(f"run.py: expected a torch built with CUDA, got {torch.__version__}")
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    results, failed = options.out / "results.json", []
    for module in ("transformers", "t2.model", "t2kernels.triton.launch"):  # imported once, for all forks
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(f"{module}: {error}", flush=True)
    print(f"imports {time.monotonic() - begin:.1f} s, Python {platform.python_version()}", flush=True)
    for name in names:
        left = options.seconds - (time.monotonic() - begin)
        if left < 5:
            print(f"{name}: skipped, {left:.0f} s left", flush=True)
            continue
        start = time.monotonic()
        ended = run_stage(name, STAGES[name], options.out, options.smoke, min(left, STAGES[name].seconds))
        Results(results).put(f"stage | {name}", {"ended": ended, "took": round(time.monotonic() - start, 1)})
        if ended != "ok":
            failed.append(name)
        (options.out / "tables.md").write_text(tables.report(json.loads(results.read_text())))
    if options.pack_cache and (cache := os.environ.get("TRITON_CACHE_DIR")):
        pack_cache(Path(cache), options.out / "triton-cache.tar.xz")
    print((options.out / "tables.md").read_text(), flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
