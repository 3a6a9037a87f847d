"""opcheck, gradcheck, torch.compile, and what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2kernels import DenseWeight, FactoredWeight, SVFLinear, ops, reference, svf_linear
from tests.t2kernels.problems import STORAGE, problem, tolerance


def factored_args(storage, batch=4):
    p = problem((20, 18, 30), batch)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
    return p, (p.x, w.u, w.vh, w.component_scale, p.scales, p.ids, p.bias, 20, False, None, None)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_opcheck(storage):
    p, args = factored_args(storage)
    torch.library.opcheck(ops.factored_linear, args)
    trained = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a is not args[3] and i in (0, 4, 6) else a
        for i, a in enumerate(args)
    ]
    torch.library.opcheck(ops.factored_linear, tuple(trained))
    y, t = ops.factored_linear(*args)
    torch.library.opcheck(ops.factored_linear_backward, (y, t, *args[1:6], 30, True, True, False, None, None))
    torch.library.opcheck(ops.factored_linear_backward, (y, t, *args[1:6], 30, False, True, False, None, None))
    d = DenseWeight.pack(torch.randn(20, 30), dtype=storage)
    torch.library.opcheck(ops.dense_linear, (p.x.clone().requires_grad_(), d.weight, d.row_scale, p.bias, 20, False))
    torch.library.opcheck(ops.dense_linear_backward, (y, d.weight, d.row_scale, 30, False))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_opcheck_group(storage):
    p, q = problem((20, 70, 30), 6), problem((9, 70, 30), 6)
    weights = [FactoredWeight.pack(each.u, each.s, each.vh, dtype=storage) for each in (p, q)]
    args = (
        p.x,
        [part for w in weights for part in w.u],
        [part for w in weights for part in w.vh],
        [w.component_scale for w in weights if w.component_scale is not None],
        [p.scales, q.scales],
        p.ids,
        [p.bias, p.bias.new_empty(0)],
        [20, 9],
        False,
        [],
        [],
    )
    torch.library.opcheck(ops.factored_linear_group, args)
    for kernel, expected in zip(ops.factored_linear_group(*args), reference.factored_linear_group(*args), strict=True):
        limit = max(1e-3, tolerance(torch.float32, storage))
        torch.testing.assert_close(kernel, expected, atol=limit, rtol=limit)


def test_opcheck_plain_factors():
    p = problem((20, 18, 30), 4)
    z = p.scales.clone().requires_grad_()
    torch.library.opcheck(ops.factored_linear, (p.x, [p.u], [p.vh], None, z, p.ids, None, 20, False, None, None))


def test_gradcheck_of_the_reference():
    p = problem((5, 4, 6), 3)
    x, s, z, bias = (t.double().requires_grad_() for t in (p.x, p.s, p.z, p.bias))
    u, vh = p.u.double(), p.vh.double()

    def run(x, s, z, bias):
        return reference.svf_linear_ref(x, u, s, vh, z, bias, p.ids)

    assert torch.autograd.gradcheck(run, (x, s, z, bias))


@pytest.mark.parametrize("kernel", ["factored_linear", "dense_linear"])
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_reference_operators_equal_the_kernels(kernel, storage):
    p, args = factored_args(storage, batch=13)
    limit = max(1e-4, tolerance(torch.float32, storage))
    if kernel == "dense_linear":
        d = DenseWeight.pack(torch.randn(20, 30), dtype=storage)
        args = (p.x, d.weight, d.row_scale, p.bias, 20, False)
    expected, actual = getattr(reference, kernel)(*args), getattr(ops, kernel)(*args)
    for mine, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=limit * max(1, float(theirs.abs().max())), rtol=limit)
    y = actual[0] if kernel == "factored_linear" else actual
    tail = (30, True, True, False, None, None) if kernel == "factored_linear" else (30, False)
    inner = (y, actual[1], *args[1:6]) if kernel == "factored_linear" else (y, *args[1:3])
    torch.testing.assert_close(
        getattr(ops, f"{kernel}_backward")(*inner, *tail),
        getattr(reference, f"{kernel}_backward")(*inner, *tail),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("experts", [None, 3])
def test_compile_fullgraph(storage, experts):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = SVFLinear.from_linear(nn.Linear(30, 20), dtype=storage, num_experts=experts)
    with torch.no_grad():
        layer.z.add_(torch.randn_like(layer.z), alpha=0.2)
    x = torch.randn(6, 30, requires_grad=True)
    ids = None if experts is None else torch.tensor([0, 1, 2, 2, 1, 0])
    block = nn.Sequential()
    compiled = torch.compile(lambda x: torch.relu(layer(x, ids)) + block(x)[:, :20], fullgraph=True)
    expected = torch.relu(layer(x, ids)) + x[:, :20]
    expected.sum().backward()
    grads = x.grad.clone(), layer.z.grad.clone()
    x.grad = layer.z.grad = None
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close((x.grad, layer.z.grad), grads)


def test_compile_with_dynamic_batch():
    torch._dynamo.reset()
    layer = SVFLinear.from_linear(nn.Linear(30, 20))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (2, 3, 9):
        x = torch.randn(batch, 30)
        torch.testing.assert_close(compiled(x), layer(x))


def test_autograd_keeps_neither_x_nor_anything_of_w_size():
    p = problem((64, 48, 80), 10)
    z, x = p.z.clone().requires_grad_(), p.x.clone().requires_grad_()
    sizes: list[tuple[int, ...]] = []

    def record(t):
        sizes.append(tuple(t.shape))
        assert t.data_ptr() != x.data_ptr()
        return t

    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
        y = svf_linear(x, p.u, p.s, p.vh, z, expert_ids=p.ids)
    y.sum().backward()
    assert (10, 48) in sizes and (64, 80) not in sizes and (10, 80) not in sizes


def test_only_what_is_asked_for_gets_a_gradient():
    p = problem((20, 18, 30), 4)
    w = FactoredWeight.pack(p.u, p.s, p.vh)
    x = p.x.clone().requires_grad_()
    w.linear(x, p.scales, p.ids).sum().backward()
    assert x.grad is not None
    scales = p.scales.clone().requires_grad_()
    w.linear(p.x, scales, p.ids).sum().backward()
    assert scales.grad is not None and not w.linear(p.x, p.scales, p.ids).requires_grad
