"""Every operator against the float64 reference, on every instruction set this processor runs."""

from __future__ import annotations

import pytest
import torch

from t2kernels import DenseWeight, FactoredWeight, linear_group, ops, reference, svf_linear
from t2kernels.packing import pack_panels
from tests.t2kernels.conftest import HARDWARE_DOTS
from tests.t2kernels.problems import ACTIVATIONS, BATCHES, DENSE_STORAGE, SHAPES, STORAGE, problem, tolerance


def close(actual, expected64, storage=None):
    tol = tolerance(actual.dtype, storage)
    scale = float(expected64.abs().max()) if expected64.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected64, atol=tol * max(scale, 1.0), rtol=tol)


def svf64(p, u, s, vh):
    return reference.svf_linear_ref(
        p.x.double(), u.double(), s.double(), vh.double(), p.z.double(), p.bias.double(), p.ids
    )


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_weight(extreme_set, shape, storage):
    for batch in BATCHES:
        p = problem(shape, batch)
        w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
        close(w.linear(p.x, p.scales, p.ids, p.bias), svf64(p, *w.factors()), storage)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svf_linear(extreme_set, shape, dtype):
    for batch in (0, 1, 7, 33):
        p = problem(shape, batch, dtype=dtype)
        y = svf_linear(p.x, p.u, p.s, p.vh, p.z, p.bias, expert_ids=p.ids)
        assert y.dtype == dtype
        close(y, svf64(p, p.u, p.s, p.vh))
        packed = FactoredWeight.pack(p.u, p.s, p.vh, dtype=dtype).linear(p.x, p.scales, p.ids, p.bias)
        if extreme_set in HARDWARE_DOTS and dtype == torch.bfloat16:
            close(packed, y.double())
        else:
            assert torch.equal(packed, y)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_activations_of_every_dtype_on_every_storage(instruction_set, dtype, storage):
    p = problem((33, 17, 40), 9, dtype=dtype)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
    y = w.linear(p.x, p.scales, p.ids, p.bias)
    assert y.dtype == dtype
    close(y, svf64(p, *w.factors()), storage)


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_weight(extreme_set, shape, storage):
    out, _, inputs = shape
    for batch in BATCHES:
        p = problem(shape, batch)
        w = DenseWeight.pack(torch.randn(out, inputs, generator=torch.Generator().manual_seed(3)), dtype=storage)
        expected = p.x.double() @ w.matrix().double().T
        close(w.linear(p.x), expected, storage)
        close(w.linear(p.x, p.bias), expected + p.bias.double(), storage)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_pack_rounds_within_the_format(storage):
    p = problem((577, 300, 400), 1)
    u, s, vh = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage).factors()
    exact, stored = (p.u * p.s) @ p.vh, (u * s) @ vh
    error = float((exact - stored).norm() / exact.norm())
    limits = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int8: 1.5e-2, torch.uint8: 7e-3}
    assert error <= limits[storage]
    w = torch.randn(50, 70)
    dense = DenseWeight.pack(w, dtype=storage).matrix()
    assert float((w - dense).norm() / w.norm()) <= {torch.float32: 0, torch.int8: 1.2e-2, torch.uint8: 5e-3}.get(
        storage, 3e-3
    )


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_against_float64_autograd(extreme_set, shape, storage):
    for batch in (0, 1, 7, 33):
        p = problem(shape, batch)
        w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
        inputs = [p.x, p.scales, p.bias]
        x, scales, bias = (t.clone().requires_grad_() for t in inputs)
        g = torch.randn(batch, shape[0], generator=torch.Generator().manual_seed(7))
        w.linear(x, scales, p.ids, bias).backward(g)
        x64, scales64, bias64 = (t.double().requires_grad_() for t in inputs)
        u, _, vh = (factor.double() for factor in w.factors())
        ones = torch.ones(shape[1], dtype=torch.float64)
        reference.svf_linear_ref(x64, u, ones, vh, scales64, bias64, p.ids).backward(g.double())
        close(x.grad, x64.grad)
        close(scales.grad, scales64.grad, storage)
        close(bias.grad, bias64.grad)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
def test_svf_linear_backward_through_z(instruction_set, dtype):
    p = problem((33, 17, 40), 12, dtype=dtype)
    z, x = p.z.clone().requires_grad_(), p.x.clone().requires_grad_()
    g = torch.randn(12, 33, generator=torch.Generator().manual_seed(7)).to(dtype)
    svf_linear(x, p.u, p.s, p.vh, z, expert_ids=p.ids).backward(g)
    z64, x64 = p.z.double().requires_grad_(), p.x.double().requires_grad_()
    reference.svf_linear_ref(x64, p.u.double(), p.s.double(), p.vh.double(), z64, expert_ids=p.ids).backward(g.double())
    torch.testing.assert_close(z.grad.double(), z64.grad, atol=1e-4, rtol=1e-4)
    close(x.grad, x64.grad)


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_dense_backward(instruction_set, storage):
    w = DenseWeight.pack(torch.randn(37, 50), dtype=storage)
    x, bias = torch.randn(4, 3, 50, requires_grad=True), torch.randn(37, requires_grad=True)
    g = torch.randn(4, 3, 37)
    w.linear(x, bias).backward(g)
    close(x.grad, g.double() @ w.matrix().double())
    close(bias.grad, g.double().sum((0, 1)))


def test_one_z_is_that_expert_for_every_row(instruction_set):
    p = problem((20, 18, 30), 6)
    one = svf_linear(p.x, p.u, p.s, p.vh, p.z[2], p.bias)
    ids = torch.full((6,), 2)
    assert torch.equal(one, svf_linear(p.x, p.u, p.s, p.vh, p.z, p.bias, expert_ids=ids))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 9])
def test_a_group_gives_each_layers_bits(instruction_set, layers, storage):
    for batch in (0, 1, 7, 33):
        p = problem((33, 80, 577), batch)
        shapes = [(33 + 16 * i, 80 - i, 577) for i in range(layers)]
        problems = [problem(shape, batch, seed=i) for i, shape in enumerate(shapes)]
        weights = [FactoredWeight.pack(q.u, q.s, q.vh, dtype=storage) for q in problems]
        biases = [q.bias if i % 2 else None for i, q in enumerate(problems)]
        ys = linear_group(weights, p.x, [q.scales for q in problems], p.ids, biases)
        for y, w, q, bias in zip(ys, weights, problems, biases, strict=True):
            assert torch.equal(y, w.linear(p.x, q.scales, p.ids, bias))


def test_bf16_products_round_the_activations_only(instruction_set):
    p = problem((577, 300, 1031), 33)
    exact = FactoredWeight.pack(p.u, p.s, p.vh, dtype=torch.bfloat16)
    rounded = FactoredWeight.pack(p.u, p.s, p.vh, dtype=torch.bfloat16, bf16_products=True)
    y, z = (w.linear(p.x, p.scales, p.ids, p.bias) for w in (exact, rounded))
    has_them = instruction_set in HARDWARE_DOTS
    assert torch.equal(y, z) != has_them
    # Two roundings of relative size 2^-9, uniform: the root mean square is far below their bound.
    assert float((y - z).norm() / y.norm()) < 4e-3
    u, _, vh = rounded.factors()
    x = p.x.bfloat16().float()
    t = ((x @ vh.T) * p.scales[p.ids]).bfloat16().float()
    if has_them:
        torch.testing.assert_close(z, t @ u.T + p.bias, atol=2e-2, rtol=1e-2)
    wide, same = (FactoredWeight.pack(p.u, p.s, p.vh, bf16_products=flag) for flag in (False, True))
    assert torch.equal(wide.linear(p.x, p.scales, p.ids), same.linear(p.x, p.scales, p.ids))
    dense = [DenseWeight.pack(p.vh, dtype=torch.bfloat16, bf16_products=flag).linear(p.x) for flag in (False, True)]
    assert torch.equal(*dense) != has_them
    assert float((dense[0] - dense[1]).norm() / dense[0].norm()) < 3e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_products_round_the_gradients(instruction_set, shape):
    p = problem(shape, 33)
    own = dict(u=[p.u.bfloat16()], vh=[p.vh.bfloat16()])
    packed = dict(u=[pack_panels(own["u"][0])], vh=[pack_panels(own["vh"][0])])
    out, rank, inner = shape
    g, t = torch.randn(33, out), torch.randn(33, rank)

    def run(operator, factors, g, flag):
        rest = (None, p.scales, p.ids, inner, True, True, flag, None, None)
        return operator(g, t, factors["u"], factors["vh"], *rest)

    exact = run(reference.factored_linear_backward, own, g, False)
    rounded = run(ops.factored_linear_backward, packed, g, True)
    nearer = run(reference.factored_linear_backward, own, g.bfloat16().float(), False)
    if out * inner > 1000:  # below, a rounding may change nothing
        wide = run(ops.factored_linear_backward, packed, g, False)
        assert torch.equal(wide[0], rounded[0]) != (instruction_set in HARDWARE_DOTS)
    for got, want, near in zip(rounded, exact, nearer, strict=True):
        assert float((got - want).norm()) <= 8e-3 * float(want.norm())
        if instruction_set in HARDWARE_DOTS:  # dx rounds the scaled h as well
            assert float((got - near).norm()) <= 4e-3 * float(near.norm())
        else:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_int8_activations_of_any_size(instruction_set):
    w = DenseWeight.pack(torch.randn(33, 1031), dtype=torch.int8)
    x = torch.randn(9, 1031)
    x[1] = 0
    x[2] *= 1e-36
    x[3] *= 1e30
    x[4, :512] *= 1e6  # blocks have scales of their own
    x[5, 7] = -3e4
    expected = x.double() @ w.matrix().double().T
    error = (w.linear(x).double() - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1e-30)
    assert float(error.max()) < 1e-3


def test_leading_dimensions(instruction_set):
    p = problem((20, 18, 30), 12)
    x = p.x.reshape(3, 2, 2, 30)
    ids = torch.tensor([4, 0, 2])
    y = svf_linear(x, p.u, p.s, p.vh, p.z, expert_ids=ids)
    assert y.shape == (3, 2, 2, 20)
    flat = svf_linear(p.x, p.u, p.s, p.vh, p.z, expert_ids=ids.repeat_interleave(4))
    assert torch.equal(y.reshape(12, 20), flat)
    assert svf_linear(x[:, :0], p.u, p.s, p.vh, p.z, expert_ids=ids).shape == (3, 0, 2, 20)
    assert svf_linear(p.x[0], p.u, p.s, p.vh, p.z[0]).shape == (20,)


def test_non_contiguous_and_expanded_inputs(instruction_set):
    p = problem((20, 18, 30), 6)
    expected = svf_linear(p.x, p.u, p.s, p.vh, p.z, p.bias, expert_ids=p.ids)

    def strided(t):
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    y = svf_linear(
        strided(p.x),
        p.u.T.contiguous().T,
        strided(p.s),
        strided(p.vh),
        strided(p.z),
        p.bias,
        expert_ids=strided(p.ids),
    )
    assert torch.equal(y, expected)
    w = FactoredWeight.pack(strided(p.u), p.s, p.vh.T.contiguous().T)
    table = torch.randn(9, 50)
    table[2:7, 11:29] = p.scales
    window = table[2:7, 11:29]
    assert torch.equal(w.linear(strided(p.x), window, p.ids, p.bias), expected)
    assert torch.equal(w.linear(p.x, strided(p.scales), p.ids, strided(p.bias).contiguous()), expected)
    row = p.x[:1].expand(6, 30)
    assert torch.equal(w.linear(row, window, p.ids), w.linear(row.contiguous(), window, p.ids))
    g = torch.ones(1, 1).expand(6, 20)
    x = p.x.clone().requires_grad_()
    w.linear(x, window, p.ids).backward(g)
    close(x.grad, ((g @ p.u) * p.scales[p.ids]).double() @ p.vh.double())


@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_nan_and_infinity_stay_in_their_row(instruction_set, storage):
    p = problem((33, 70, 33), 8)
    w = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
    expected = w.linear(p.x, p.scales, p.ids)
    p.x[3] = float("nan")
    p.x[5, 0] = float("inf")
    y = w.linear(p.x, p.scales, p.ids)
    rows = [0, 1, 2, 4, 6, 7]
    assert torch.equal(y[rows], expected[rows])
    assert not torch.isfinite(y[[3, 5]]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_round_as_torch_does(instruction_set, dtype):
    special = torch.tensor(
        [0.0, -0.0, 1e-8, 6e-8, 3.1e-5, 6.1e-5, 65504, 65519, 65520, 1e6, float("inf"), float("nan")]
    )
    random = torch.randn(500) * torch.logspace(-9, 5, 500)
    values = torch.cat([special, -special, random]).to(dtype)
    identity = DenseWeight.pack(torch.ones(1, 1))
    exact = values.float() * 1.0009765625  # so that results need rounding again
    scaled = DenseWeight.pack(torch.full((1, 1), 1.0009765625))
    assert torch.equal(identity.linear(values[:, None])[:, 0].nan_to_num(7), values.nan_to_num(7))
    assert torch.equal(scaled.linear(values[:, None])[:, 0].nan_to_num(7), exact.to(dtype).nan_to_num(7))


def test_operators_check_their_arguments(instruction_set):
    p = problem((20, 18, 30), 6)
    w = FactoredWeight.pack(p.u, p.s, p.vh)
    run = ops.factored_linear
    for bad, text in [
        ((p.x, w.u, w.vh, None, p.scales, p.ids[:4], None, 20, False), "do not divide"),
        ((p.x, w.u, w.vh, None, p.scales, p.ids + 5, None, 20, False), "slots: entry .* expected 0 <= id < 5"),
        ((p.x, w.u, w.vh, None, p.scales, p.ids - 9, None, 20, False), "slots: entry"),
        ((p.x, w.u, w.vh, None, p.scales, p.ids, None, 40, False), "u: expected contiguous panels"),
        ((p.x, [p.u], [p.vh], None, p.scales, p.ids, None, 21, False), r"u: expected shape \[21, 18\], got \[20, 18\]"),
        ((p.x.double(), [p.u], [p.vh], None, p.scales, p.ids, None, 20, False), "x: expected float32"),
        ((p.x, [p.u], [p.vh], p.s[:3], p.scales, p.ids, None, 20, False), "component_scale: expected 18"),
        ((p.x, [p.u], [p.vh], None, p.scales.double(), p.ids, None, 20, False), "scales: expected float32"),
        ((p.x, [p.u], [p.vh], None, p.scales, p.ids, p.bias[:3], 20, False), "bias: expected 20"),
        ((p.x, w.u, [], None, p.scales, p.ids, None, 20, False), "vh: expected as many parts as u, 1, got 0"),
        ((p.x, w.u * 3, w.vh * 3, None, p.scales, p.ids, None, 20, False), "u: expected at most 2 parts, got 3"),
        ((p.x, w.u * 2, w.vh * 2, None, p.scales, p.ids, None, 20, False), "vh: expected parts of rank 18 in all"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            run(*bad, None, None)
