"""All that a GPU has to say about these kernels, in one command and without a network.

    python benchmarks/gpu_suite.py [--quick]

Builds in place, runs `pytest -m gpu` (and compute-sanitizer where there is one), measures what the chip can do, tunes,
and times every path on CUDA events over replayed CUDA graphs, with weights that take turns past the L2 cache. Every
figure is written as it comes, so an interrupted run goes on where it stopped. Writes
benchmarks/results/gpu-<name>.json and the same as tables in docs/gpu-<name>.md. `--smoke` walks through the timings in
tiny sizes on the CPU: a test of this program, no measurement.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.popularity import popular as popular_ids  # noqa: E402
from t2kernels import FactoredWeight, ops  # noqa: E402
from t2kernels.files import write_text  # noqa: E402
from t2kernels.weights import FactoredGroup  # noqa: E402

GROUPS = {  # model: groups of layers that share their input: (name, in, outs)
    "Llama-3-8B": (
        ("q, k, v", 4096, (4096, 1024, 1024)),
        ("o", 4096, (4096,)),
        ("gate, up", 4096, (14336, 14336)),
        ("down", 14336, (4096,)),
    ),
    "Llama-3-70B": (
        ("q, k, v", 8192, (8192, 1024, 1024)),
        ("o", 8192, (8192,)),
        ("gate, up", 8192, (28672, 28672)),
        ("down", 28672, (8192,)),
    ),
    "smoke": (("q, k, v", 128, (128, 64, 64)), ("down", 96, (64,))),
}
DECODE, PREFILL = (1, 2, 4, 8, 16, 32, 64), (512, 2048, 4096, 16384)
EXPERTS = (1, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Sizes:
    """What one run covers."""

    models: tuple[str, ...]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    experts: tuple[int, ...]
    seconds: float  # of timing for each figure


FULL = Sizes(("Llama-3-8B", "Llama-3-70B"), DECODE, PREFILL, EXPERTS, 0.2)
QUICK = Sizes(("Llama-3-8B",), (1, 8, 32, 64), (2048,), (1, 64, 1024), 0.05)
SMOKE = Sizes(("smoke",), (1, 3), (40,), (1, 3), 0.0)


class Clock:
    """Seconds of a call, in turns over copies of its weights that the L2 cache can't hold together."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0

    def copies(self, weight_bytes: int) -> int:
        return max(1, min(16, math.ceil(2 * self.cache_bytes / max(weight_bytes, 1)) + 1))

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
        """The time of one call: {"seconds", "graph": whether replayed as a CUDA graph}."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for call in calls:
                call()
            return {"seconds": (time.perf_counter() - start) / len(calls), "graph": False}
        for call in (*calls, *calls):
            call()
        torch.cuda.synchronize()
        graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:  # a peer that talks to the host while it runs
            graph = None
            torch.cuda.synchronize()

        def once() -> None:
            if graph is not None:
                graph.replay()
            else:
                for call in calls:
                    call()

        one = self._timed(once, 1)
        repeats = max(1, min(200, int(self.seconds / 5 / one)))
        found = statistics.median(self._timed(once, repeats) for _ in range(5))
        return {"seconds": found / len(calls), "graph": graph is not None}

    @staticmethod
    def _timed(run: Callable[[], None], repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


class Layers:
    """Random factors of one group of layers in bfloat16, and every way to run them."""

    def __init__(self, inputs: int, outs: Sequence[int], clock: Clock) -> None:
        self.inputs, self.outs, self.clock = inputs, tuple(outs), clock
        self.device = clock.device
        g = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            scale = size[-1] ** -0.5
            return (torch.randn(*size, device=self.device, generator=g) * scale).bfloat16()

        self.factors = [(normal(out, min(out, inputs)), normal(min(out, inputs), inputs)) for out in outs]
        self.entries = sum(u.numel() + vh.numel() for u, vh in self.factors)
        self.dense_entries = sum(out * inputs for out in outs)

    def scales(self, experts: int) -> list[Tensor]:
        ranks = [u.shape[1] for u, _ in self.factors]
        table = 1 + 0.1 * torch.randn(experts, sum(ranks), device=self.device)
        return list(table.split(ranks, dim=1))

    def x(self, rows: int) -> Tensor:
        return torch.randn(rows, self.inputs, device=self.device).bfloat16()

    def rotate(self, weight_bytes: int, make: Callable[[], Callable[[], Any]]) -> list[Callable[[], Any]]:
        return [make() for _ in range(self.clock.copies(weight_bytes))]

    def ours(self, storage: torch.dtype, rows: int, ids: Tensor) -> list[Callable[[], Any]]:
        scales, x = self.scales(int(ids.max()) + 1), self.x(rows)
        nothing = [None] * len(self.outs)

        def make() -> Callable[[], Any]:
            group = FactoredGroup([pack(u, vh, storage) for u, vh in self.factors])
            return lambda: group.linear_unchecked(x, scales, ids, nothing)

        return self.rotate(self.entries * storage.itemsize, make)

    def backward(self, storage: torch.dtype, rows: int) -> list[Callable[[], Any]]:
        """Gradients of x and of one expert's scale, all layers of the group."""
        slots = torch.zeros(1, dtype=torch.int64, device=self.device)
        weights = [pack(u, vh, storage) for u, vh in self.factors]
        grads = [torch.randn(rows, out, device=self.device).bfloat16() for out in self.outs]
        ts = [torch.randn(rows, w.rank, device=self.device) for w in weights]
        scales = self.scales(1)

        def run() -> None:
            for w, g, t, scale in zip(weights, grads, ts, scales, strict=True):
                ops.factored_linear_backward(g, t, w.u, w.vh, w.component_scale, scale, slots, self.inputs, True, True)

        return [run]

    def torch_backward(self, rows: int) -> list[Callable[[], Any]]:
        """The same gradients with cuBLAS products."""
        grads = [torch.randn(rows, out, device=self.device).bfloat16() for out in self.outs]
        ts = [torch.randn(rows, u.shape[1], device=self.device) for u, _ in self.factors]
        scales = self.scales(1)

        def run() -> None:
            for (u, vh), g, t, scale in zip(self.factors, grads, ts, scales, strict=True):
                h = g @ u
                (t * h).sum(0)
                (h * scale[0]).bfloat16() @ vh

        return [run]

    def dense(self, rows: int) -> list[Callable[[], Any]]:
        x = self.x(rows)

        def make() -> Callable[[], Any]:
            weight = torch.randn(sum(self.outs), self.inputs, device=self.device).bfloat16()
            return lambda: F.linear(x, weight)

        return self.rotate(2 * self.dense_entries, make)

    def two_products(self, rows: int) -> list[Callable[[], Any]]:
        """cuBLAS on the two products alone, nothing between them: what prefill is held against."""
        x = self.x(rows)

        def make() -> Callable[[], Any]:
            factors = [(u.clone(), vh.clone()) for u, vh in self.factors]
            return lambda: [F.linear(F.linear(x, vh), u) for u, vh in factors]

        return self.rotate(2 * self.entries, make)

    def torch_factored(self, rows: int, ids: Tensor, compiled: bool) -> list[Callable[[], Any]]:
        scales, x = [s.bfloat16() for s in self.scales(int(ids.max()) + 1)], self.x(rows)

        def linear(x: Tensor, factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            return [F.linear(F.linear(x, vh) * s[ids], u) for (u, vh), s in zip(factors, scales, strict=True)]

        run = torch.compile(linear, mode="max-autotune-no-cudagraphs") if compiled else linear

        def make() -> Callable[[], Any]:
            factors = [(u.clone(), vh.clone()) for u, vh in self.factors]
            return lambda: run(x, factors)

        return self.rotate(2 * self.entries, make)

    def multi_lora(self, rows: int, ids: Tensor, rank: int = 16) -> list[Callable[[], Any]]:
        """The dense product and each row's adapter, gathered."""
        from benchmarks.multi_lora import add_lora

        x, experts = self.x(rows), int(ids.max()) + 1

        def make() -> Callable[[], Any]:
            weights = [torch.randn(out, self.inputs, device=self.device).bfloat16() for out in self.outs]
            a = [torch.randn(experts, rank, self.inputs, device=self.device).bfloat16() for _ in self.outs]
            b = [torch.randn(experts, out, rank, device=self.device).bfloat16() for out in self.outs]
            return lambda: [
                add_lora(F.linear(x, w), x, own_a, own_b, ids) for w, own_a, own_b in zip(weights, a, b, strict=True)
            ]

        return self.rotate(2 * self.dense_entries, make)

    def peft_mixed(self, rows: int, ids: Tensor, rank: int = 16) -> list[Callable[[], Any]]:
        from peft import LoraConfig, get_peft_model

        layers = nn.Sequential(*(nn.Linear(self.inputs, out, bias=False) for out in self.outs))
        config = LoraConfig(r=rank, target_modules=[str(i) for i in range(len(self.outs))], init_lora_weights=False)
        model = get_peft_model(layers, config, adapter_name="expert0")
        for i in range(1, int(ids.max()) + 1):
            model.add_adapter(f"expert{i}", config)
        model = model.to(self.device, torch.bfloat16)
        x, names = self.x(rows), [f"expert{int(i)}" for i in ids]
        loras = [model.base_model.model[i] for i in range(len(self.outs))]
        return [lambda: [lora(x, adapter_names=names) for lora in loras]]

    def eigentune(self, rows: int) -> list[Callable[[], Any]]:
        """One expert for all rows is what it serves."""
        from eigentune.config import EigenTuneConfig
        from eigentune.layers import EigenTuneLinear
        from eigentune.svd import Bases

        x, adapted = self.x(rows), []
        for u, vh in self.factors:
            base = nn.Linear(self.inputs, u.shape[0], bias=False, device=self.device, dtype=torch.bfloat16)
            ones = torch.ones(u.shape[1], device=self.device)
            bases = Bases(u.float(), ones, vh.float(), tuple(range(u.shape[1])), "")
            layer = EigenTuneLinear(base, bases, EigenTuneConfig(rank=u.shape[1]))
            adapted.append(layer.to(self.device, torch.bfloat16))
        return [lambda: [layer(x) for layer in adapted]]


def pack(u: Tensor, vh: Tensor, storage: torch.dtype) -> FactoredWeight:
    return FactoredWeight.pack(u, torch.ones(u.shape[1], device=u.device), vh, dtype=storage)


def popular(kind: str, rows: int, device: torch.device) -> Tensor:
    return popular_ids(kind, rows).to(device)


class Results:
    """A JSON file of measurements by name, written whole after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"measurements": {}}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored measurement, made now if there is none. A path that fails is stored with its error."""
        done = self.data["measurements"]
        if name not in done:
            try:
                done[name] = measure()
            except Exception as error:  # the peers of a benchmark may fail in their own ways
                done[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            self.save()
        return done[name]

    def save(self) -> None:
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")


def ceilings(device: torch.device, clock: Clock, smoke: bool) -> dict[str, float]:
    """Bytes a second of a copy (read and written) and bfloat16 multiply-adds a second of the largest product."""
    size, side = (1 << 16, 64) if smoke else (1 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).bfloat16()
    copying = clock([lambda: target.copy_(source)])["seconds"]
    return {"copy": 2 * size / copying, "multiply_adds": side**3 / clock([lambda: a @ a])["seconds"]}


def command(*words: str, timeout: int = 600) -> dict[str, Any]:
    """A step of its own process: exit status and the end of what it said."""
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "seconds": timeout}
    return {"status": done.returncode, "output": (done.stdout + done.stderr)[-2000:]}


def tune(layers: Layers, rows: Sequence[int], storages: Sequence[torch.dtype]) -> dict[str, Any]:
    from t2kernels.triton import tuning

    quick = Clock(layers.device, 0.01)
    best = {}
    for storage, count in itertools.product(storages, rows):
        ids = torch.arange(count, device=layers.device) % 32
        (call, *_) = layers.ours(storage, count, ids)
        best |= tuning.tune(call, lambda run: quick([run])["seconds"], layers.device)
    return {key: str(tile) for key, tile in best.items()}


def cases(layers: Layers, sizes: Sizes, storages: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every timing of one group of layers: its name, and what makes the calls to time."""
    device, gpu = layers.device, layers.device.type == "cuda"
    for rows in sizes.decode:
        ids = torch.arange(rows, device=device)
        for storage in storages:
            yield f"decode {rows} | ours {name_of(storage)}", lambda s=storage, r=rows, i=ids: layers.ours(s, r, i)
        yield f"decode {rows} | dense cuBLAS", lambda r=rows: layers.dense(r)
        yield f"decode {rows} | torch factored", lambda r=rows, i=ids: layers.torch_factored(r, i, False)
        if gpu:
            yield f"decode {rows} | torch.compile factored", lambda r=rows, i=ids: layers.torch_factored(r, i, True)
            yield f"decode {rows} | multi-LoRA gathered", lambda r=rows, i=ids: layers.multi_lora(r, i)
        if rows in (1, 32):
            yield f"decode {rows} | PEFT mixed", lambda r=rows, i=ids: layers.peft_mixed(r, i)
    for rows in sizes.prefill:
        ids = torch.arange(rows, device=device) * min(rows // 8, 32) // rows
        for storage in storages:
            yield f"prefill {rows} | ours {name_of(storage)}", lambda s=storage, r=rows, i=ids: layers.ours(s, r, i)
        yield f"prefill {rows} | dense cuBLAS", lambda r=rows: layers.dense(r)
        yield f"prefill {rows} | two cuBLAS products", lambda r=rows: layers.two_products(r)
        yield f"prefill {rows} | torch factored", lambda r=rows, i=ids: layers.torch_factored(r, i, False)
        yield f"prefill {rows} | eigentune", lambda r=rows: layers.eigentune(r)
        if rows <= 4096:
            yield f"backward {rows} | ours bfloat16", lambda r=rows: layers.backward(torch.bfloat16, r)
            yield f"backward {rows} | cuBLAS", lambda r=rows: layers.torch_backward(r)
    rows = max(sizes.decode)
    for kind in ("identical", "uniform", "zipf", "distinct"):
        ids = popular(kind, rows, device)
        yield f"popularity {rows} {kind} | ours bfloat16", lambda i=ids: layers.ours(torch.bfloat16, rows, i)
    for experts in sizes.experts:  # as many in the table, drawn from all of it
        ids = torch.linspace(0, experts - 1, rows, device=device).round().long()
        yield f"table of {experts} | ours bfloat16", lambda i=ids: layers.ours(torch.bfloat16, rows, i)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report(data: dict[str, Any]) -> str:
    """The measurements as tables: a group of layers each, paths against cases, microseconds."""
    machine, done = data["machine"], data["measurements"]
    lines = [f"# {machine['device']}", "", f"torch {machine['torch']}, Triton {machine['triton']}. Microseconds."]
    limits = done.get("ceilings", {})
    if "copy" in limits:
        lines += [
            "",
            f"Copy {limits['copy'] / 1e12:.2f} TB/s; bfloat16 {2 * limits['multiply_adds'] / 1e12:.0f} TFLOP/s.",
        ]
    for name in ("build", "tests", "sanitizer"):
        if name in done:
            last = str(done[name].get("output", "")).strip().splitlines()[-1:]
            lines += ["", f"{name}: status {done[name].get('status', done[name].get('error'))}. {' '.join(last)}"]
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for name, found in done.items():
        if name.count(" | ") == 2:
            group, case, path = name.split(" | ")
            cell = f"{found['seconds'] * 1e6:.1f}" if "seconds" in found else "failed"
            eager = "" if found.get("graph", True) else " (eager)"
            groups.setdefault(group, {}).setdefault(case, {})[path] = cell + eager
    for group, rows in groups.items():
        paths = list(dict.fromkeys(path for row in rows.values() for path in row))
        lines += ["", f"## {group}", "", f"| | {' | '.join(paths)} |", f"| --- |{' ---: |' * len(paths)}"]
        lines += [f"| {case} | {' | '.join(row.get(path, '') for path in paths)} |" for case, row in rows.items()]
    return "\n".join(lines) + "\n"


def main(quick: bool = False, smoke: bool = False, out: Path | None = None) -> None:
    """Args:
    quick: fewer sizes, under 9 minutes.
    smoke: tiny sizes on the CPU.
    out: the JSON file; default benchmarks/results/gpu-<name>.json. Beside it, or in docs, the tables.
    """
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("gpu_suite: expected an NVIDIA GPU, found none (torch.cuda.is_available() is false)")
    device = torch.device("cpu" if smoke else "cuda")
    name = "smoke" if smoke else torch.cuda.get_device_name().replace(" ", "-").lower()
    path = out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    sizes = SMOKE if smoke else QUICK if quick else FULL
    results, clock = Results(path), Clock(device, sizes.seconds)
    results.data["machine"] = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
    }
    storages = [torch.bfloat16, torch.int8]
    if not smoke:
        results.once("build", lambda: command(sys.executable, "setup.py", "build_ext", "--inplace"))
        results.once("tests", lambda: command(sys.executable, "-m", "pytest", "-q", "-m", "gpu", timeout=240))
        if shutil.which("compute-sanitizer") and not quick:
            check = ("compute-sanitizer", "--tool", "memcheck", sys.executable, "-m", "pytest", "-q", "-m", "gpu")
            results.once("sanitizer", lambda: command(*check, "-k", "group or gradients"))
        if torch.cuda.get_device_capability() >= (8, 9):
            storages.append(torch.float8_e4m3fn)
    results.once("ceilings", lambda: ceilings(device, clock, smoke))
    groups = [(model, *group) for model in sizes.models for group in GROUPS[model]]
    with torch.inference_mode(), tqdm(groups, desc="groups of layers") as progress:
        for model, group, inputs, outs in progress:
            layers = Layers(inputs, outs, clock)
            title = f"{model} {group}"
            if not smoke and not quick:
                rows = (*sizes.decode, *sizes.prefill)
                results.once(f"tuned {title}", lambda rows=rows, layers=layers: tune(layers, rows, storages))
            for case, make in cases(layers, sizes, storages):
                progress.set_postfix_str(case)
                results.once(f"{title} | {case}", lambda make=make: clock(make()))
            del layers
            if device.type == "cuda":
                torch.cuda.empty_cache()
    table = path.with_suffix(".md") if out or smoke else ROOT / "docs" / f"gpu-{name}.md"
    write_text(table, report(results.data))
    print(f"wrote {path} and {table}")


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    tyro.cli(main)
