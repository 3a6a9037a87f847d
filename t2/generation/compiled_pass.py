"""A pass of the engine without Python: traced by torch.export, compiled by AOTInductor, and kept on disk.

One program serves any number of tokens. It calls the package's kernels for products and attention; what lies between
them, norms and rotation and sums, becomes a few loops. Sums, and the operators that round in a way of their own
(`FAITHFUL`), stay torch's functions, so a pass gives the same bits either way. That is checked when a program is
loaded, and one that gives others is not used.

The compiler runs in a process of its own and never sees a weight. Programs are kept below `cache_root() / "passes"`,
by a hash of all they depend on.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import xxhash
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from t2.generation.row_cache import Places, RowCache, run_pass
from t2.generation.whole_batches import WholeBatchEngine
from t2.model.routing import Route
from t2.model.svf_model import SVFModel
from t2kernels.backends import extension
from t2kernels.files import cache_root, delete_unused, replacing
from t2kernels.pages import collapse_pages

if TYPE_CHECKING:
    from t2.generation.engine import Engine

RUNNER, RUNNER_SOURCE = "t2_pass_runner", Path(__file__).with_name("pass_runner.cpp")
SMALL = 64
"""Tensors of at most so many numbers may become constants of a program, which then depends on their values."""
CHECKED_ROWS = (1, 2, 7, 32)
"""Numbers of tokens with which a program is compared with the model."""
FAITHFUL = (
    *("sum", "prod", "var", "var_mean", "std", "cumsum", "logsumexp", "linalg_vector_norm"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "softmax", "_softmax", "_log_softmax"),
    *("silu", "gelu", "tanh", "sigmoid", "softplus", "elu", "mish", "hardswish", "erf"),
    *("exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos", "tan", "atan", "sinh", "cosh"),
)
"""aten operators that stay what they are: inductor's own code for them rounds otherwise."""


class PassModule(nn.Module):
    """`run_pass` as a module of which the cache's buffers are a part."""

    def __init__(self, svf: SVFModel, cache: RowCache) -> None:
        super().__init__()
        self.svf, self._cache = svf, RowCache(cache.windows, cache.rows, cache.capacity)
        for name, buffer in cache.buffers().items():
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        self._cache.take({name: getattr(self, name) for name in self._cache.names()})
        with self.svf.router.within(Route(slots)):
            return run_pass(self.svf.model, self._cache, Places(rows, positions, self._cache.capacity), ids)

    def tensors(self) -> dict[str, Tensor]:
        """All weights and buffers, by every name that they have."""
        named = self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False)
        return {name: tensor for each in named for name, tensor in each}


class Compilation:
    """Lets an engine's passes run as a compiled program as soon as there is one; until then they run as they are.

    The engine's thread traces the model, unless the program is on disk, and loads the program, both between two steps.
    The compiler takes a core for a minute or so meanwhile.

    Args:
        news: is given one line: that passes run compiled, or why they go on without.
    """

    def __init__(self, engine: Engine, news: Callable[[str], None]) -> None:
        self._engine, self._news = engine, news
        self._compiler: subprocess.Popen[str] | None = None
        self._cancelled = False
        self.thread = threading.Thread(target=self._run, name="t2-compile", daemon=True)
        self.thread.start()

    def __enter__(self) -> Compilation:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled = True
        if self._compiler is not None:
            self._compiler.kill()

    def finish(self) -> None:
        """Steps an engine without a thread of its own until the news has come."""
        while self.thread.is_alive():
            self._engine.step()
            self.thread.join(0.01)

    def _run(self) -> None:
        engine = self._engine
        try:
            if engine.svf.sigma.device.type != "cpu" or extension is None or isinstance(engine, WholeBatchEngine):
                raise RuntimeError("programs are for engines of single tokens on CPUs with the package's kernels")
            if engine.svf.svf_config.mesh is not None:
                raise RuntimeError("programs are for models of one process")
            collapse_pages(itertools.chain(engine.svf.model.parameters(), engine.svf.model.buffers()))
            with tempfile.TemporaryDirectory() as folder:
                traced = Path(folder) / "traced.pt2"
                path = engine.call(lambda: prepare(engine, traced)).result()
                if traced.is_file():
                    self._compile(traced, path)
            engine.call(lambda: load(engine, path)).result()
        except Exception as error:
            if not self._cancelled:
                self._news(f"passes are not compiled: {type(error).__name__}: {error}")
        else:
            self._news("passes run compiled")

    def _compile(self, traced: Path, path: Path) -> None:
        """Compiles a traced model. Raises RuntimeError with the last line of what the compiler printed."""
        with replacing(path) as temporary:
            program = traced.with_name("program.pt2")
            command = [sys.executable, "-m", "t2.generation.compiled_pass"]
            command += [str(traced), str(program), str(runner_file())]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self._compiler = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
            if self._cancelled:
                self._compiler.kill()
            printed, _ = self._compiler.communicate()
            if self._compiler.returncode:
                lines = printed.strip().splitlines() or [f"exit code {self._compiler.returncode}"]
                raise RuntimeError(f"the compiler failed: {lines[-1]}")
            shutil.copyfile(program, temporary)


def prepare(engine: Engine, traced: Path) -> Path:
    """The path of the engine's program; where there is nothing yet, the traced model is written for the compiler."""
    module = PassModule(engine.svf, engine.cache).eval()
    path = cache_root() / "passes" / f"{program_key(module)}.pt2"
    if not path.is_file() or not runner_file().is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_unused((*path.parent.glob("*.pt2"), *path.parent.glob("runner-*.so")))
        left_out = nullcontext() if engine.head is None else engine.head.left_out()
        with torch.inference_mode(False), torch.no_grad(), left_out, warnings.catch_warnings():
            tokens = Dim("tokens", min=2, max=1 << 20)
            inputs = tuple(torch.arange(3) % engine.cache.rows for _ in range(4))
            shapes = tuple({0: tokens} for _ in inputs)
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
        _replace_weights(program, "meta")
        torch.export.save(program, traced)
    return path


def _replace_weights(program: ExportedProgram, device: str) -> None:
    """Puts tensors without content in place of a program's weights; nothing reads or writes them. Small ones stay."""
    for tensors in (program._state_dict, program._constants):
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.numel() <= SMALL:
                continue
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty


def runner_file() -> Path:
    """The built `pass_runner.cpp`, for this Python and torch."""
    digest = xxhash.xxh3_64(RUNNER_SOURCE.read_bytes())
    digest.update(f"{sys.version} {torch.__version__} {platform.machine()}".encode())
    return cache_root() / "passes" / f"runner-{digest.hexdigest()}.so"


def program_key(module: PassModule) -> str:
    """A hash of what a program depends on: the sources that are traced, shapes and options, versions, this machine."""
    svf = module.svf
    sources = [file for package in ("t2", "t2kernels") for file in _sources(package)]
    sources.append(Path(inspect.getfile(type(svf.model))))
    table = svf.slot_table.table.untyped_storage().data_ptr()

    def about(tensor: Tensor) -> object:
        if tensor.untyped_storage().data_ptr() == table:  # as many slots as experts need, with whatever scales
            return tuple(tensor.shape[1:]), tensor.stride(), str(tensor.dtype)
        values = tensor.tolist() if tensor.numel() <= SMALL else None
        return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), values

    weights = [(name, about(tensor)) for name, tensor in module.tensors().items()]
    digest = xxhash.xxh3_128()
    for part in (
        *(file.read_bytes() for file in sources),
        str(weights).encode(),
        svf.model.config.to_json_string(use_diff=False).encode(),  # type: ignore[operator, union-attr]
        str((svf.svf_config.bf16_products, torch.__version__, transformers.__version__, platform.machine())).encode(),
        _processor().encode(),
    ):
        digest.update(part)
    return digest.hexdigest()


def _sources(package: str) -> list[Path]:
    file = sys.modules[package].__file__
    assert file is not None
    folder = Path(file).parent
    untraced = {"server", "cli", "integrations"}
    return sorted(path for path in folder.rglob("*.py") if untraced.isdisjoint(path.parts))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def load(engine: Engine, path: Path) -> None:
    """Lets the engine's passes run on the program, if it gives the bits that the model gives."""
    program = CompiledPass(engine.svf, engine.cache, path)
    cache, used = engine.cache, min(engine.svf.slot_table.in_use, 3)
    for count in CHECKED_ROWS:
        each = torch.arange(count)
        places = Places(torch.full((count,), engine.max_rows), each % cache.capacity, cache.capacity)
        results = []
        for run in (engine.run_model, program):
            states = run(each % engine.vocabulary, places, each % used)
            results.append([states, *(buffer[engine.max_rows].clone() for buffer in cache.buffers().values())])
        if not all(torch.equal(*(t.view(torch.uint8) for t in pair)) for pair in zip(*results, strict=True)):
            raise RuntimeError(f"the program gives other bits than the model for {count} tokens")
    engine.compiled = program
    for loaded in (path, runner_file()):
        with suppress(OSError):  # a cache that others own
            loaded.touch()


class CompiledPass:
    """A program with a model's weights, which it shares, and with its cache."""

    def __init__(self, svf: SVFModel, cache: RowCache, path: Path) -> None:
        self._svf, self._cache = svf, cache
        found = importlib.util.spec_from_file_location(RUNNER, runner_file())
        assert found is not None and found.loader is not None
        runner: Any = importlib.util.module_from_spec(found)
        found.loader.exec_module(runner)
        self._program = runner.Program(str(path))
        self._take_weights()

    def _take_weights(self) -> None:
        tensors = PassModule(self._svf, self._cache).tensors()
        self._weights = {name: tensors[name] for name in self._program.weights()}
        self._program.take_weights(self._weights)
        self._generation = self._svf.table_generation

    def __call__(self, ids: Tensor, places: Places, slots: Tensor) -> Tensor:
        """`run_pass` with a slot [tokens] for each token."""
        if self._svf.table_generation != self._generation:
            self._take_weights()
        states: Tensor
        (states,) = self._program.run([ids, places.positions, places.rows, slots])
        return states


def _mean(x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """As torch computes it on a CPU: a sum, divided."""
    dims = dim or list(range(x.dim()))
    total = torch.ops.aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype)
    return total / math.prod(x.shape[d] for d in dims)


def main(traced: str, path: str, runner: str) -> None:
    """The compiler's process."""
    import os

    from torch._inductor import decomposition, lowering
    from torch.utils import cpp_extension

    import t2kernels  # noqa: F401 — its operators

    os.nice(10)
    if not Path(runner).is_file():
        folder = Path(traced).parent
        cpp_extension.load(RUNNER, [str(RUNNER_SOURCE)], build_directory=str(folder), with_cuda=False)
        with replacing(Path(runner)) as temporary:
            shutil.copyfile(folder / f"{RUNNER}.so", temporary)
    for packet in (getattr(torch.ops.aten, name) for name in FAITHFUL):
        for operator in (getattr(packet, overload) for overload in packet.overloads()):
            decomposition.decompositions.pop(operator, None)
            lowering.lowerings.pop(operator, None)
            lowering.make_fallback(operator, warn=False)
    decomposition.decompositions[torch.ops.aten.mean.dim] = _mean
    program = torch.export.load(traced)
    _replace_weights(program, "cpu")
    # One thread: waking others costs more than a few rows' loops take. Products and attention have their own.
    options = {"emulate_precision_casts": True, "aot_inductor.package_constants_in_so": False, "cpp.threads": 1}
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
