"""One factored layer, a different expert in every row, against torch on the same products.

    python -m pytest benchmarks/kernels/linear.py --benchmark-json=benchmarks/results/cpu-linear.json

Every test times all its paths in turns, with the machine's limits beside them (`benchmarks/common/interleave.py`).
Weights of consecutive calls are together too large for the caches. T2KERNELS_CPU=avx2 with ATEN_CPU_CAPABILITY=avx2,
MKL_ENABLE_INSTRUCTIONS=AVX2 and ONEDNN_MAX_CPU_ISA=AVX2 keeps all paths to AVX2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.interleave import cold, in_turns
from t2kernels import FactoredWeight, ops

SHAPES = {  # out, in
    "Llama-3-8B q, o": (4096, 4096),
    "Llama-3-8B k, v": (1024, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "SmolLM2 q, o": (576, 576),
    "SmolLM2 k, v": (192, 576),
    "SmolLM2 gate, up": (1536, 576),
    "SmolLM2 down": (576, 1536),
    "ragged 577 x 1031": (577, 1031),
    "ragged 1000 x 7": (1000, 7),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
SQUARE = "Llama-3-8B q, o"
HALVES = (torch.bfloat16, torch.float16)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Layer:
    """Factors of one random matrix, and the ways to compute with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.out_features, self.in_features = SHAPES[name]
        self.rank = min(SHAPES[name])
        g = torch.Generator().manual_seed(0)
        self.u = torch.randn(self.out_features, self.rank, generator=g) / self.rank**0.5
        self.vh = torch.randn(self.rank, self.in_features, generator=g) / self.in_features**0.5
        self.s = torch.rand(self.rank, generator=g) + 0.5
        self.factor_entries = self.u.numel() + self.vh.numel()

    def ours(self, storage: torch.dtype, x: Tensor, scales: Tensor, ids: Tensor) -> Callable[[], Any]:
        first = FactoredWeight.pack(self.u, self.s, self.vh, dtype=storage)

        def copy(i: int) -> FactoredWeight:
            return first if i == 0 else FactoredWeight.pack(self.u, self.s, self.vh, dtype=storage)

        return cold(copy, first.nbytes, lambda w: w.linear_unchecked(x, scales, ids))

    def torch_factored(self, x: Tensor, scales: Tensor, ids: Tensor) -> Callable[[], Any]:
        u, vh, scales = (t.to(x.dtype) for t in (self.u, self.vh, scales))
        return cold(
            lambda i: (u.clone(), vh.clone()),
            self.factor_entries * x.element_size(),
            lambda f: ((x @ f[1].T) * scales[ids]) @ f[0].T,
        )

    def torch_dense(self, x: Tensor) -> Callable[[], Any]:
        weight = ((self.u * self.s) @ self.vh).to(x.dtype)
        return cold(lambda i: weight.clone(), weight.numel() * weight.element_size(), lambda w: F.linear(x, w))


@pytest.fixture(scope="module", params=SHAPES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


def requests(layer: Layer, batch: int, experts: int) -> tuple[Tensor, Tensor]:
    """Activations x [batch, in] and one row of scales for each expert."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, layer.in_features, generator=g)
    return x, layer.s * (1 + 0.1 * torch.randn(experts, layer.rank, generator=g))


@pytest.mark.parametrize("batch", BATCHES)
def test_linear(benchmark: Any, layer: Layer, batch: int) -> None:
    """A different expert in every row. Activations are float32 unless the path says otherwise."""
    x, scales = requests(layer, batch, batch)
    ids = torch.arange(batch)
    eager = (torch.float32, *HALVES) if batch < 64 else (torch.float32, torch.bfloat16)  # float16 is far behind there
    paths = {
        "ours bfloat16, bfloat16 x": layer.ours(torch.bfloat16, x.bfloat16(), scales, ids),
        **{f"ours {short(d)}": layer.ours(d, x, scales, ids) for d in (torch.float32, *HALVES, torch.int8)},
        **{f"torch factored {short(d)}": layer.torch_factored(x.to(d), scales, ids) for d in eager},
        "torch dense float32": layer.torch_dense(x),
        "torch dense bfloat16": layer.torch_dense(x.bfloat16()),
    }
    in_turns(benchmark, paths, shape=layer.name, batch=batch, size=SHAPES[layer.name])


class TorchModule(nn.Module):
    """Factored layer as a module whose weights `torch.compile` may freeze and pack."""

    def __init__(self, u: Tensor, vh: Tensor) -> None:
        super().__init__()
        self.u, self.vh = nn.Parameter(u, requires_grad=False), nn.Parameter(vh, requires_grad=False)

    def forward(self, x: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.vh) * scales[ids], self.u)


@pytest.mark.parametrize("batch", (1, 4, 8, 16, 64))
def test_compile(benchmark: Any, batch: int) -> None:
    """torch.compile at its best: max-autotune, weights frozen."""
    from torch._inductor import config

    layer = Layer(SQUARE)
    x, scales = requests(layer, batch, batch)
    ids = torch.arange(batch)
    paths = {"ours bfloat16, bfloat16 x": layer.ours(torch.bfloat16, x.bfloat16(), scales, ids)}
    paths["ours bfloat16"] = layer.ours(torch.bfloat16, x, scales, ids)
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        module = TorchModule(layer.u.to(dtype), layer.vh.to(dtype))
        args = (x.to(dtype), scales.to(dtype), ids)
        with torch.no_grad(), config.patch(freezing=True):
            compiled = torch.compile(module, mode="max-autotune")
            compiled(*args)

        def run(compiled: Any = compiled, args: Any = args) -> None:
            with torch.inference_mode(False), torch.no_grad():
                compiled(*args)

        paths[f"torch.compile {short(dtype)}"] = run
    in_turns(benchmark, paths, shape=layer.name, batch=batch, size=SHAPES[layer.name])


@pytest.mark.parametrize("batch", (64, 512, 2048))
def test_backward(benchmark: Any, layer: Layer, batch: int) -> None:
    """Gradients of x and of one expert's scale: our kernels, and torch's products on row-major float32 factors."""
    g = torch.Generator().manual_seed(1)
    grad_y, t = torch.randn(batch, layer.out_features, generator=g), torch.randn(batch, layer.rank, generator=g)
    scales, slots = layer.s[None], torch.zeros(1, dtype=torch.int64)
    packed = {
        short(d): FactoredWeight.pack(layer.u, layer.s, layer.vh, dtype=d)
        for d in (torch.float32, torch.bfloat16, torch.int8)
    }

    def ours(w: FactoredWeight, round_to_bf16: bool = False) -> Any:
        args = (grad_y, t, w.u, w.vh, w.component_scale, scales, slots, layer.in_features, True, True)
        return ops.factored_linear_backward(*args, round_to_bf16, None, None)

    def library() -> Any:
        h = grad_y @ layer.u
        return (h * scales[0]) @ layer.vh, (t * h).sum(0)

    paths: dict[str, Callable[[], Any]] = {f"ours {name}": (lambda w=w: ours(w)) for name, w in packed.items()}
    paths["ours bfloat16 products"] = lambda: ours(packed["bfloat16"], True)
    in_turns(benchmark, {**paths, "torch float32": library}, shape=layer.name, batch=batch, size=SHAPES[layer.name])


def test_paths_agree() -> None:
    """All timed paths compute the same result."""
    layer = Layer("SmolLM2 down")
    x, scales = requests(layer, 4, 4)
    ids = torch.tensor([0, 3, 1, 1])
    expected = ((x @ layer.vh.T) * scales[ids]) @ layer.u.T
    for run in (
        layer.ours(torch.float32, x, scales, ids),
        layer.torch_factored(x, scales, ids),
        lambda: TorchModule(layer.u, layer.vh)(x, scales, ids),
    ):
        torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
