"""The operators on an NVIDIA GPU: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

import t2kernels
from t2kernels import DenseWeight, FactoredWeight, linear_group, svf_linear
from t2kernels.packing import GPU_STORAGE_DTYPES
from tests.t2kernels.problems import ACTIVATIONS, problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("error:t2kernels"),  # the reference in place of a kernel is a failure
]
BATCHES = [0, 1, 7, 17, 64, 65, 257, 300]  # both sides of the boundaries between tiles
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def on_gpu(shape, batch, dtype=torch.float32, experts=5, seed=0):
    p = problem(shape, batch, experts=experts, seed=seed, dtype=dtype)
    for name in ("x", "u", "s", "vh", "z", "ids", "bias"):
        setattr(p, name, getattr(p, name).cuda())
    return p


def close(actual, expected, dtype):
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype] * scale, rtol=TOLERANCE[dtype])


def svf64(p, w):
    u, _, vh = (factor.double() for factor in w.factors())
    return ((p.x.double() @ vh.T) * p.scales.double()[p.ids]) @ u.T + p.bias.double()


FP8 = torch.float8_e4m3fn
CASES = [
    *((dtype, storage, (577, 577, 1031)) for dtype in ACTIVATIONS for storage in GPU_STORAGE_DTYPES),
    *((torch.bfloat16, storage, (1031, 577, 577)) for storage in GPU_STORAGE_DTYPES),
    *((torch.bfloat16, storage, (4096, 1024, 1024)) for storage in (torch.bfloat16, torch.int8, FP8)),
    *((dtype, dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in ((1, 1, 1), (7, 1, 5))),
    *((torch.bfloat16, torch.int8, shape) for shape in ((1, 1, 1), (7, 1, 5))),
]
"""Activations, storage and [out, rank, in]: each costs a compilation for every kind of tile."""


def storages():
    return [d for d in GPU_STORAGE_DTYPES if has(d)]


def has(storage):
    return storage != FP8 or torch.cuda.get_device_capability() >= (8, 9)


@pytest.fixture(autouse=True)
def _only_storage_of_this_gpu(request):
    if not has(getattr(request.node, "callspec", None) and request.node.callspec.params.get("storage")):
        pytest.skip("needs a GPU with fp8")


def test_the_kernels_are_there():
    assert t2kernels.backends()["triton"].startswith("available")


@pytest.mark.parametrize(("dtype", "storage", "shape"), CASES, ids=str)
def test_linear(dtype, storage, shape):
    p = on_gpu(shape, max(BATCHES), dtype)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=storage)
    expected = svf64(p, w)
    for batch in BATCHES:
        y = w.linear(p.x[:batch], p.scales, p.ids[:batch], p.bias)
        close(y, expected[:batch], dtype)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
def test_gradients(dtype, storage):
    for batch in (1, 300):
        p = on_gpu((577, 300, 1031), batch, dtype)
        w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=storage)
        x, scales = p.x.clone().requires_grad_(), p.scales.clone().requires_grad_()
        g = torch.randn(batch, 577, device="cuda").to(dtype)
        w.linear(x, scales, p.ids).backward(g)
        u, _, vh = (factor.double() for factor in w.factors())
        x64, scales64 = p.x.double().requires_grad_(), p.scales.double().requires_grad_()
        (((x64 @ vh.T) * scales64[p.ids]) @ u.T).backward(g.double())
        close(x.grad, x64.grad, dtype)
        close(scales.grad, scales64.grad, torch.float32)


def test_moving_between_devices_changes_the_layout_and_nothing_else():
    p = problem((100, 96, 130), 9)
    for storage in (torch.float32, torch.bfloat16, torch.int8):
        w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
        before = [factor.clone() for factor in w.factors()]
        expected = w.linear(p.x, p.scales, p.ids)
        moved = w.cuda()
        y = moved.linear(p.x.cuda(), p.scales.cuda(), p.ids.cuda()).cpu()
        rounding = torch.float16 if storage == torch.int8 else torch.float32  # of the CPU: 16 bits of activations
        close(y, expected.double(), rounding)
        back = moved.cpu()
        assert all(torch.equal(a, b) for a, b in zip(before, back.factors(), strict=True))
        assert torch.equal(back.linear(p.x, p.scales, p.ids), expected)


@pytest.mark.parametrize("storage", GPU_STORAGE_DTYPES, ids=str)
def test_group_and_dense(storage):
    p = on_gpu((256, 128, 512), 33, torch.bfloat16)
    q = on_gpu((64, 64, 512), 33, torch.bfloat16, seed=1)
    ws = [FactoredWeight.pack(each.u.float(), each.s, each.vh.float(), dtype=storage) for each in (p, q)]
    with torch.no_grad():
        ys = linear_group(ws, p.x, [p.scales, q.scales], p.ids, [p.bias, None])
        assert torch.equal(ys[0], ws[0].linear(p.x, p.scales, p.ids, p.bias))
        assert torch.equal(ys[1], ws[1].linear(p.x, q.scales, p.ids))
    dense = DenseWeight.pack(torch.randn(300, 512, device="cuda"), dtype=storage)
    close(dense.linear(p.x), p.x.double() @ dense.matrix().double().T, torch.bfloat16)


@pytest.mark.parametrize("storage", (torch.bfloat16, torch.int8, FP8, torch.float16), ids=str)
def test_a_row_does_not_depend_on_its_batch(storage):
    """Bit for bit, at every batch size that changes tiles, at any position, with any neighbours."""
    p = on_gpu((1024, 512, 1024), 1024, torch.bfloat16)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=storage)
    with torch.no_grad():
        whole = w.linear(p.x, p.scales, p.ids)
        for batch in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129, 255, 256, 257, 500, 1023):
            for first in (0, 1024 - batch):
                own = slice(first, first + batch)
                assert torch.equal(w.linear(p.x[own], p.scales, p.ids[own]), whole[own]), (batch, first)


@pytest.mark.parametrize("slot", [-1, 5, 1 << 32])
def test_a_slot_that_is_not_there_is_nan_in_its_row_alone(slot):
    """Nothing is read for it, and the host does not wait to find out."""
    p = on_gpu((512, 256, 384), 17, torch.bfloat16, experts=5)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=torch.int8)
    ids, others = p.ids.clone(), torch.arange(17, device="cuda") != 11
    ids[11] = slot
    x = p.x.clone().requires_grad_()
    y, expected = w.linear(x, p.scales, ids), w.linear(p.x, p.scales, p.ids)
    assert y[11].isnan().all() and torch.equal(y[others], expected[others])
    y.sum().backward()
    assert x.grad[11].isnan().all() and not x.grad[others].isnan().any()


def test_the_same_bits_every_time():
    p = on_gpu((577, 300, 1031), 300, torch.bfloat16)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=torch.bfloat16)
    g = torch.randn(300, 577, device="cuda").bfloat16()

    def gradients():
        x, scales = p.x.clone().requires_grad_(), p.scales.clone().requires_grad_()
        y = w.linear(x, scales, p.ids)
        y.backward(g)
        return y.detach(), x.grad, scales.grad

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_cuda_graph_replays_with_new_inputs_and_slots():
    p, other = on_gpu((512, 256, 384), 8, torch.bfloat16), on_gpu((512, 256, 384), 8, torch.bfloat16, seed=1)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=torch.bfloat16)
    x, ids, scales = p.x.clone(), p.ids.clone(), p.scales.clone()
    with torch.no_grad():
        for _ in range(2):
            w.linear_unchecked(x, scales, ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = w.linear_unchecked(x, scales, ids)
        for given in (p, other):
            x.copy_(given.x), ids.copy_(given.ids), scales.copy_(given.scales)
            graph.replay()
            assert torch.equal(y, w.linear_unchecked(given.x, given.scales, given.ids))


def test_compiled_without_a_break():
    p = on_gpu((512, 256, 384), 8, torch.bfloat16)
    w = FactoredWeight.pack(p.u.float(), p.s, p.vh.float(), dtype=torch.bfloat16)
    run = torch.compile(lambda x: w.linear_unchecked(torch.relu(x), p.scales, p.ids), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(run(p.x), w.linear_unchecked(torch.relu(p.x), p.scales, p.ids))


def test_more_than_two_to_the_31_elements():
    rows, features = 70_000, 32_768
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB of GPU memory")
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    w = DenseWeight.pack(torch.randn(16, features, device="cuda") / features**0.5, dtype=torch.bfloat16)
    y = w.linear(x)
    close(y[-3:], x[-3:].double() @ w.matrix().double().T, torch.bfloat16)


def test_svf_linear_on_plain_and_strided_factors():
    p = on_gpu((129, 65, 200), 33)
    expected = ((p.x.double() @ p.vh.double().T) * p.scales.double()[p.ids]) @ p.u.double().T
    u, vh = p.u.T.contiguous().T, p.vh.T.contiguous().T
    close(svf_linear(p.x, u, p.s, vh, p.z, expert_ids=p.ids), expected, torch.float32)
