"""The delta form on the Triton kernels, run by the interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from t2kernels import reference
from t2kernels.packing import EIGHT_BITS, GPU_STORAGE_DTYPES, interleave, quantize
from tests.t2kernels.problems import ACTIVATIONS, problem

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("on a GPU: TRITON_INTERPRET=1 pytest tests/t2kernels/triton", allow_module_level=True)

from t2kernels.triton import launch  # noqa: E402
from tests.t2kernels.triton.test_triton_kernels import close  # noqa: E402

SHAPES = [(7, 1, 5), (48, 16, 128), (130, 33, 257)]  # out, components, in


class Delta:
    """Random W and components as a GPU holds them."""

    def __init__(self, shape, storage, seed=0):
        p = problem(shape, 1, seed=seed)
        pair = torch.bfloat16 if storage in EIGHT_BITS else storage
        w = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(seed + 1)) / shape[2] ** 0.5
        self.u, self.vh, self.row_scale = [p.u.to(pair)], [p.vh.to(pair)], None
        self.plain = w.to(storage) if storage not in EIGHT_BITS else None
        if storage in EIGHT_BITS:
            self.plain, self.row_scale = quantize(w, 0, storage)
        self.base = interleave(self.plain) if storage == torch.int8 else self.plain

    @property
    def full(self):
        """W, U and Vh in float64."""
        w = self.plain.double() if self.row_scale is None else self.plain.double() * self.row_scale.double()[:, None]
        return w, self.u[0].double(), self.vh[0].double()


@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, dtype, storage):
    out, _, inputs = shape
    d = Delta(shape, storage)
    w, u, vh = d.full
    for batch in (0, 1, 17):
        p = problem(shape, batch, dtype=dtype)
        scales = p.scales.clone()
        scales[2] = 0
        p.ids[: batch // 2] = 2
        y, t = launch.factored_linear(p.x, d.u, d.vh, None, scales, p.ids, p.bias, out, False, d.base, d.row_scale)
        x, rows = p.x.double(), scales.double()[p.ids]
        close(y, x @ w.T + ((x @ vh.T) * rows) @ u.T + p.bias.double(), dtype)
        close(t, x @ vh.T, torch.float32 if dtype != torch.float16 else dtype)
        plain = launch.dense_linear(p.x, d.base, d.row_scale, p.bias, out, False)
        if dtype == torch.float16:  # another tile: the interpreter adds up a step's terms in an order of its own
            close(y[p.ids == 2], plain[p.ids == 2].double(), dtype)
        else:
            assert torch.equal(y[p.ids == 2], plain[p.ids == 2])
        g = torch.randn(batch, out, generator=torch.Generator().manual_seed(7)).to(dtype)
        back = (g, t, d.u, d.vh, None, scales, p.ids, inputs)
        dx, dscales = launch.factored_linear_backward(*back, True, True, False, d.base, d.row_scale)
        h = g.double() @ u
        close(dx, (h * rows) @ vh + g.double() @ w, dtype)
        wanted = torch.zeros(scales.shape, dtype=torch.float64).index_add_(0, p.ids, t.double() * h)
        close(dscales, wanted, torch.float32)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8], ids=str)
def test_a_group_is_its_layers_and_follows_other_inputs(storage):
    shapes = [(48, 16, 130), (40, 8, 130), (16, 3, 130)]
    layers = [Delta(shape, storage, seed=i) for i, shape in enumerate(shapes)]
    prepared: dict = {}
    own = [[part for layer in layers for part in getattr(layer, name)] for name in ("u", "vh")]
    bases = [layer.base for layer in layers]
    base_scales = [layer.row_scale for layer in layers] if storage == torch.int8 else []
    outs = [shape[0] for shape in shapes]
    for seed in range(3):
        ps = [problem(shape, 9, dtype=torch.bfloat16, seed=seed + 10 * i) for i, shape in enumerate(shapes)]
        x, ids = ps[0].x, ps[0].ids
        biases = [ps[0].bias, ps[1].bias[:0], ps[2].bias] if seed != 1 else []
        given = (x, *own, [], [p.scales for p in ps], ids, biases, outs, False, bases, base_scales)
        ys = launch.run_group(prepared, *given)
        for i, (y, layer) in enumerate(zip(ys, layers, strict=True)):
            bias = biases[i] if biases and biases[i].numel() else None
            args = (x, layer.u, layer.vh, None, ps[i].scales, ids, bias, outs[i], False, layer.base, layer.row_scale)
            assert torch.equal(y, launch.factored_linear(*args)[0])
    assert len(prepared) == 2
    alone = launch.run_group({}, x, [], [], [], [x[:1, :0]] * 3, ids[:1] * 0, [], outs, False, bases, base_scales)
    for y, layer, out in zip(alone, layers, outs, strict=True):
        assert torch.equal(y, launch.dense_linear(x, layer.base, layer.row_scale, None, out, False))


def test_the_reference_agrees():
    shape = (48, 16, 128)
    d, p = Delta(shape, torch.float32), problem(shape, 9)
    args = (p.x, d.u, d.vh, None, p.scales, p.ids, p.bias, 48, False, d.base, d.row_scale)
    for got, want in zip(launch.factored_linear(*args), reference.factored_linear(*args), strict=True):
        close(got, want.double(), torch.float32)
