"""Decode and prefill of a whole model of Llama-3-8B's shapes on one GPU: dense, factored, and gathered LoRA.

Weights and factors are random. A decode step is everything between two tokens: embedding, layers, `lm_head`, argmax,
and writing the token back; it is captured as a CUDA graph over a `StaticCache`. All paths share the transformers model
and one attention function, so they differ in their linear layers alone. Every row of a batch has an expert of its own
in the factored paths, and an adapter of its own in the LoRA path. After the capture the rows get other experts, and the
replayed step is compared with an eager one.

On a GPU each path runs in a process of its own, since a failed capture leaves its process unusable. All of them import
and compile their kernels at the same time; then they are measured one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.initialization import no_init_weights

from benchmarks.common.tables import ROOT
from t2 import Expert, SVFConfig, SVFModel
from t2.weights.targets import linear_layers
from t2kernels import DenseWeight, FactoredWeight, Factors

ATTENTION = "benchmark_attention"
CONFIG = ROOT / "benchmarks" / "configs" / "llama-3-8b.json"
STORAGES = {"bf16": torch.bfloat16, "int8": torch.int8}
TITLES = {"dense": "dense bf16", "lora": "gathered LoRA"} | {name: f"ours {name}" for name in STORAGES}
PATHS = ("dense", "int8", "lora", "bf16")  # in the order they are measured
ADAPTERS, RANK = 32, 16
STD = 0.02  # of dense weights, and of W = U diag(s) Vh


class Store(Protocol):
    """Keeps measurements by name (`benchmarks.gpu.harness.Results`)."""

    def once(self, name: str, measure: Callable[[], dict[str, Any]], /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Sizes:
    """Sizes of one run.

    rows: batch sizes of the decode step, each with as many experts.
    cache, filled: positions of the static cache, and how many are filled before the first step.
    replays: timed steps of each batch size.
    eager_steps: steps that Python issues one by one; eager_rows: at which batch sizes.
    prefill: tokens of the prompt.
    seconds: limit for one path; total_seconds: for all of them.
    """

    rows: tuple[int, ...] = (32, 8, 1)
    cache: int = 512
    filled: int = 128
    replays: int = 50
    eager_steps: int = 10
    eager_rows: tuple[int, ...] = (1, 32)
    prefill: int = 2048
    seconds: float = 75.0
    total_seconds: float = 240.0


SMOKE = Sizes(rows=(3, 1), cache=32, filled=8, replays=2, eager_steps=2, eager_rows=(1,), prefill=12)


# The model


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. Decode does not repeat keys for the query heads that share them.

    With a mask, transformers' "sdpa" copies keys and values for every query head: 17 GB a step at 32 rows and 512
    positions. Here the query heads of one key head are passed as that head's tokens.
    """
    rows, heads, tokens, size = query.shape
    if tokens == 1:
        grouped = query.reshape(rows, key.shape[1], -1, size)
        y = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
        return y.reshape(rows, 1, heads, size), None
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)  # without a mask function: transformers passes 4-D masks or None


def llama_config(smoke: bool = False, layers: int | None = None) -> LlamaConfig:
    """Llama-3-8B, or a tiny model for a test of the program."""
    options = json.loads(CONFIG.read_text())
    if smoke:
        options |= {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 160,
        }
    if layers is not None:
        options["num_hidden_layers"] = layers
    return LlamaConfig(**options, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def dense_model(
    config: LlamaConfig, device: torch.device, implementation: str = ATTENTION, seed: int = 0
) -> LlamaForCausalLM:
    """The model in bfloat16 with random weights, made on the device."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # the same attention kernels whatever torch prefers
    with device, no_init_weights():
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation=implementation
        )
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, STD, generator=generator)
    return model.requires_grad_(False).eval()


class RandomFactors:
    """Random U, s and Vh of a weight's shape on its device, so that W has entries of deviation `STD`.

    Columns of U and rows of Vh have a norm of about 1. Equal shapes get copies of the same factors: storage of their
    own, so that every layer is read from memory.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._made: dict[tuple[int, ...], Factors] = {}

    def __call__(self, name: str, weight: Tensor) -> Factors:
        shape = tuple(weight.shape)
        if shape not in self._made:
            out, features = shape
            rank = min(out, features)
            g = torch.Generator(weight.device).manual_seed(self._seed + len(self._made))

            def normal(rows: int, columns: int, std: float) -> Tensor:
                made = torch.empty(rows, columns, device=weight.device, dtype=torch.bfloat16)
                return made.normal_(0.0, std, generator=g)

            s = torch.full((rank,), STD * (out * features / rank) ** 0.5, device=weight.device)
            self._made[shape] = Factors(normal(out, rank, out**-0.5), s, normal(rank, features, features**-0.5))
        return Factors(*(factor.clone() for factor in self._made[shape]))


def factored_model(model: nn.Module, config: SVFConfig) -> SVFModel:
    """Wraps the model with random factors in place of a decomposition; on a GPU its dense weights are freed."""
    svf = SVFModel(model, config, factors=RandomFactors())
    if svf.sigma.device.type != "cpu":  # `detach`, `merge` and, on a CPU, plans need them
        for target in svf.decomposed.layers.values():
            target.weight = None
    return svf


# The paths


class Subject:
    """Model to measure, and the way a batch is served with it."""

    model: nn.Module

    def serving(self, rows: int, shift: int = 0) -> AbstractContextManager[object]:
        """Within the block, row i of the batch has expert i + shift."""
        return nullcontext()

    def weight_bytes(self, rows: int) -> int:
        """Weights that one decode step reads."""
        raise NotImplementedError


class Dense(Subject):
    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self.model: LlamaForCausalLM = dense_model(config, device)

    def weight_bytes(self, rows: int) -> int:
        layers = [*linear_layers(self.model).values(), self.model.lm_head]
        return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)


class Factored(Subject):
    """t2's model with one more expert than the largest batch has rows."""

    def __init__(self, config: LlamaConfig, device: torch.device, storage: torch.dtype, experts: int) -> None:
        wanted = SVFConfig(dtype=storage, cache=False, progress=False)
        self.svf = factored_model(dense_model(config, device), wanted)
        self.model = self.svf
        for index in range(experts):
            self.svf.add_expert(str(index), Expert.random(self.svf.layout, seed=index))
        self._experts = experts

    @contextmanager
    def serving(self, rows: int, shift: int = 0) -> Iterator[None]:
        with self.svf.route([str((row + shift) % self._experts) for row in range(rows)]):
            yield

    def weight_bytes(self, rows: int) -> int:
        modules = self.svf.model.modules()
        return sum(module.nbytes for module in modules if isinstance(module, FactoredWeight | DenseWeight))


class GatheredLinear(nn.Module):
    """A linear layer and each row's LoRA adapter."""

    def __init__(self, linear: nn.Linear, ids: Tensor) -> None:
        super().__init__()
        self.linear, self.ids = linear, ids
        out, features = linear.weight.shape
        self.a = linear.weight.new_empty(ADAPTERS, RANK, features).normal_(0.0, features**-0.5)
        self.b = linear.weight.new_empty(ADAPTERS, out, RANK).normal_(0.0, STD)
        self._add = _add_lora(linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        rows = x.numel() // x.shape[-1]
        self._add(y.view(rows, -1), x.reshape(rows, -1), self.a, self.b, self.ids[:rows])
        return y


def _add_lora(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    if device.type == "cuda":
        from benchmarks.gpu.gathered_lora import add_lora

        return add_lora

    def in_torch(y: Tensor, x: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Tensor:
        return y.add_(torch.einsum("br,bor->bo", torch.einsum("bi,bri->br", x, a[ids]), b[ids]))

    return in_torch


class GatheredLoRA(Subject):
    """The dense model with 32 adapters of rank 16 on all its linear layers."""

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self.model: LlamaForCausalLM = dense_model(config, device)
        ids = torch.arange(ADAPTERS, device=device)
        self._layers = []
        with torch.no_grad():
            for name, linear in linear_layers(self.model).items():
                assert isinstance(linear, nn.Linear)
                self._layers.append(GatheredLinear(linear, ids))
                self.model.set_submodule(name, self._layers[-1])

    def weight_bytes(self, rows: int) -> int:
        dense = [*(layer.linear for layer in self._layers), self.model.lm_head]
        adapters = sum(t.numel() * t.element_size() for layer in self._layers for t in (layer.a, layer.b))
        return sum(2 * layer.weight.numel() for layer in dense) + adapters * min(rows, ADAPTERS) // ADAPTERS


def make_subject(path: str, config: LlamaConfig, device: torch.device, sizes: Sizes) -> Subject:
    if path in STORAGES:
        return Factored(config, device, STORAGES[path], max(*sizes.rows, *sizes.eager_rows) + 1)
    return {"dense": Dense, "lora": GatheredLoRA}[path](config, device)


# The measurements


class Decoder:
    """The decode step of a batch on buffers at fixed addresses: a CUDA graph of it can be replayed.

    The cache begins with `filled` random positions; `reset` goes back there.
    """

    def __init__(self, model: nn.Module, config: LlamaConfig, device: torch.device, rows: int, sizes: Sizes) -> None:
        self.model, self.filled = model, sizes.filled
        head_dim = config.hidden_size // config.num_attention_heads
        cache: Any = StaticCache(config=config, max_cache_len=sizes.cache)
        cache.early_initialization(rows, config.num_key_value_heads, head_dim, torch.bfloat16, device)
        g = torch.Generator(device).manual_seed(rows)
        for layer in cache.layers:
            layer.keys[:, :, : sizes.filled].normal_(generator=g)
            layer.values[:, :, : sizes.filled].normal_(generator=g)
        self.cache: Any = cache
        self._first = torch.randint(3, config.vocab_size, (rows, 1), device=device, generator=g)
        self.token, self.position = self._first.clone(), torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._places = torch.arange(sizes.cache, device=device)
        self._open = torch.zeros(1, 1, 1, sizes.cache, dtype=torch.bfloat16, device=device)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        self.token.copy_(self._first)
        self.position.fill_(self.filled)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """The logits [rows, vocabulary] after `token`, which becomes the next one."""
        mask = self._open.masked_fill(self._places > self.position, -torch.inf)
        logits: Tensor = self.model(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        return logits


@dataclass
class Replay:
    """A step that can be run again: a CUDA graph, or without one the step itself. `logits` are the last ones."""

    run: Callable[[], None]
    graph: bool
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def make_replay(decoder: Decoder, device: torch.device) -> Replay:
    """Warms the step up, and captures it on a GPU."""
    if device.type != "cuda":
        eager = Replay(lambda: None, False)

        def run() -> None:
            eager.logits = decoder.step()

        eager.run = run
        for _ in range(2):
            run()
        return eager
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoder.step()
    return Replay(graph.replay, True, logits)


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of so many calls in a row: between CUDA events on a GPU."""
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) / 1e3 for first, last in itertools.pairwise(events)]


def kernels_of(run: Callable[[], object], device: torch.device, most: int = 16) -> list[dict[str, Any]]:
    """The kernels of a call that take the most time: name, launches, microseconds."""
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        wait(device)
    found = [
        {"name": event.key[:90], "launches": event.count, "microseconds": event.device_time_total}
        for event in profile.key_averages()
        if event.device_time_total > 0
    ]
    return sorted(found, key=lambda each: -each["microseconds"])[:most]


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def start_peak(device: torch.device) -> None:
    """Frees what nothing refers to and starts a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def decode(subject: Subject, decoder: Decoder, rows: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds of a decode step; of the factored paths also whether a replay follows a change of experts."""
    device = decoder.token.device
    found: dict[str, Any] = {}
    with subject.serving(rows):
        replay = make_replay(decoder, device)
        decoder.reset()
        seconds = seconds_of(replay.run, sizes.replays, device)
        decoder.reset()
        replay.run()
        first = replay.logits.clone()
        decoder.reset()
        found["replay_against_eager"] = difference(first, decoder.step())
    step = statistics.median(seconds)
    weights = subject.weight_bytes(rows)
    found |= {
        "seconds": step,
        "mean_seconds": statistics.fmean(seconds),
        "fastest_seconds": min(seconds),
        "tokens_per_second": rows / step,
        "graph": replay.graph,
        "finite": bool(first.isfinite().all()),
        "logits_std": float(first.float().std()),
        "weight_bytes": weights,
        "weight_bytes_per_second": weights / step,
        "peak_bytes": peak_bytes(device),
    }
    if replay.graph:
        with subject.serving(rows), contextlib.suppress(RuntimeError):
            found["kernels"] = kernels_of(replay.run, device)
    if isinstance(subject, Factored):
        with subject.serving(rows, shift=1):
            decoder.reset()
            replay.run()
            replayed = replay.logits.clone()
            decoder.reset()
            found["other_experts"] = difference(replayed, decoder.step())
            found["change_by_experts"] = float((replayed.float() - first.float()).abs().max())
    return found


def difference(a: Tensor, b: Tensor) -> dict[str, Any]:
    return {
        "largest": float((a.float() - b.float()).abs().max()),
        "equal": torch.equal(a, b),
        "equal_argmax": torch.equal(a.argmax(-1), b.argmax(-1)),
    }


def eager(subject: Subject, decoder: Decoder, rows: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds of a step that Python issues, and how long Python takes to issue one to an idle device."""
    device, issued = decoder.token.device, []
    with subject.serving(rows):
        decoder.reset()
        for _ in range(3):
            wait(device)
            start = time.perf_counter()
            decoder.step()
            issued.append(time.perf_counter() - start)
        wait(device)
        start = time.perf_counter()
        for _ in range(sizes.eager_steps):
            decoder.step()
        wait(device)
        seconds = (time.perf_counter() - start) / sizes.eager_steps
    return {
        "seconds": seconds,
        "issue_seconds": min(issued),
        "tokens_per_second": rows / seconds,
        "graph": False,
    }


@torch.inference_mode()
def prefill(subject: Subject, config: LlamaConfig, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Seconds to read one prompt with one expert; the logits of its last token alone."""
    ids = torch.arange(3, 3 + sizes.prefill, device=device).remainder_(config.vocab_size)[None]
    start_peak(device)

    def run() -> Tensor:
        logits: Tensor = subject.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    with subject.serving(1):
        for _ in range(2):
            logits = run()
        seconds = seconds_of(run, 5, device)
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": sizes.prefill / statistics.median(seconds),
        "graph": False,
        "finite": bool(logits.isfinite().all()),
        "peak_bytes": peak_bytes(device),
    }


def prepare(path: str, device: torch.device, config: LlamaConfig, sizes: Sizes) -> None:
    """Compiles the kernels of a path: all its steps with a single layer."""
    config = type(config)(**(config.to_dict() | {"num_hidden_layers": 1}))
    subject = make_subject(path, config, device, sizes)
    for rows in sizes.rows:
        with subject.serving(rows):
            Decoder(subject.model, config, device, rows, sizes).step()
    if path != "lora":
        with subject.serving(1), torch.inference_mode():
            ids = torch.zeros(1, sizes.prefill, dtype=torch.int64, device=device)
            subject.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    del subject
    start_peak(device)


def run_path(
    results: Store,
    path: str,
    device: torch.device,
    config: LlamaConfig,
    sizes: Sizes,
) -> None:
    """Makes all measurements of one path, each stored at once."""
    title, start = TITLES[path], time.perf_counter()
    said = _measure_path(results, path, device, config, sizes)
    start_peak(device)
    end = time.perf_counter() - start
    print(f"{title}: {', '.join(said)} ({end:.1f} s in all)", file=sys.stderr, flush=True)


def _measure_path(results: Store, path: str, device: torch.device, config: LlamaConfig, sizes: Sizes) -> list[str]:
    """Measures and stores; returns what to print."""
    title, start = TITLES[path], time.perf_counter()
    start_peak(device)
    subject = make_subject(path, config, device, sizes)
    built = {"build_seconds": time.perf_counter() - start, "build_peak_bytes": peak_bytes(device)}
    start_peak(device)
    results.once(f"end to end | model | {title}", lambda: built | {"bytes": peak_bytes(device)})
    said = []
    for rows in sizes.rows:
        start_peak(device)
        decoder = Decoder(subject.model, config, device, rows, sizes)
        found = results.once(
            f"end to end | decode {rows} | {title}",
            functools.partial(decode, subject, decoder, rows, sizes),
        )
        said.append(f"{rows} rows {found.get('seconds', float('nan')) * 1e3:.2f} ms")
        if path != "lora" and rows in sizes.eager_rows:
            results.once(
                f"end to end | eager {rows} | {title}", functools.partial(eager, subject, decoder, rows, sizes)
            )
    if path != "lora":
        del decoder
        found = results.once(
            f"end to end | prefill {sizes.prefill} | {title}",
            functools.partial(prefill, subject, config, device, sizes),
        )
        said.append(f"prefill {found.get('seconds', float('nan')) * 1e3:.1f} ms")
    return said


# A process for each path


class Printed:
    """Store that prints each measurement as a line of JSON, errors too; an error that spoils the process is raised."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def once(self, name: str, measure: Callable[[], dict[str, Any]], /) -> dict[str, Any]:
        try:
            found = measure()
        except Exception as error:  # kernels may fail in their own ways
            traceback.print_exc()
            wait(self._device)  # raises again if the process is spoilt
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"name": name, "value": found}), flush=True)
        return found


class PathProcess:
    """A path in a process of its own, which waits between `prepare` and its turn."""

    def __init__(self, path: str, options: Sequence[str]) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.end_to_end", "--child", path, *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = threading.Event()
        self._store: Store | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                said = None
            if not isinstance(said, dict):  # a library's own words
                print(line, end="", flush=True)
            elif "ready" in said:
                self.ready.set()
            elif self._store is not None:
                self._store.once(said["name"], lambda said=said: said["value"])
        self.ready.set()

    def run(self, results: Store, seconds: float) -> bool:
        """Gives the path its turn; True if it finished in time."""
        self._store = results
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("go\n")
            self._process.stdin.close()
        try:
            status: int | None = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        self.stop()
        self._reader.join(5.0)
        return status == 0

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def measure(
    results: Store,
    device: torch.device,
    smoke: bool,
    *,
    paths: Sequence[str] = PATHS,
    own_processes: bool | None = None,
) -> None:
    """Stores "end to end | <case> | <path>" for all paths; a path that fails is stored with "error".

    Args:
        smoke: Tiny sizes, no CUDA graphs.
        own_processes: Measure each path in its own process; default on a GPU.
    """
    sizes = SMOKE if smoke else Sizes()
    if unknown := set(paths) - set(PATHS):
        raise ValueError(f"paths: expected some of {', '.join(PATHS)}, got {', '.join(sorted(unknown))}")
    if not (device.type == "cuda" if own_processes is None else own_processes):
        for path in paths:
            run_path(results, path, device, llama_config(smoke), sizes)
        return
    options = ["--smoke"] if smoke else []
    start = time.perf_counter()

    def left() -> float:
        """Seconds for the next step."""
        return max(0.0, min(sizes.seconds, start + sizes.total_seconds - time.perf_counter()))

    processes = [PathProcess(path, options) for path in paths]
    try:
        for process in processes:  # all compile before anything is timed
            process.ready.wait(max(0.0, start + sizes.seconds - time.perf_counter()))
        print(f"end to end: {len(processes)} paths ready after {time.perf_counter() - start:.1f} s", flush=True)
        for process in processes:
            if not process.run(results, left()):
                results.once(f"end to end | failed | {TITLES[process.path]}", lambda: {"error": "see the log"})
    finally:
        for process in processes:
            process.stop()


def pick_device(smoke: bool) -> torch.device:
    """The GPU; with `smoke` the CPU. SystemExit if there is none."""
    if smoke:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU, found none (torch.cuda.is_available() is false)")
    return torch.device("cuda", 0)


def main() -> None:
    """One path, as a child of `measure`; starts at the first line on standard input."""
    parser = argparse.ArgumentParser(description="Child process of `python -m benchmarks.gpu.run --stages end_to_end`.")
    parser.add_argument("--child", choices=PATHS, required=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    config, sizes = llama_config(options.smoke), SMOKE if options.smoke else Sizes()
    device = pick_device(options.smoke)
    prepare(options.child, device, config, sizes)
    print(json.dumps({"ready": True}), flush=True)
    if sys.stdin.readline():
        run_path(Printed(device), options.child, device, config, sizes)


if __name__ == "__main__":
    main()
