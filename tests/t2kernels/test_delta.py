"""The delta form: W x + U_S ((V_S x) * scale) in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2kernels import DeltaWeight, DenseWeight, linear_group, ops, reference
from tests.t2kernels.problems import ACTIVATIONS, DENSE_STORAGE, SHAPES, problem, tolerance


def delta(shape, storage, seed=0):
    """A problem whose rank is a support's, its W, and both packed."""
    p = problem(shape, 12, seed=seed)
    w = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(seed + 1)) / shape[2] ** 0.5
    return p, DeltaWeight.pack(w, p.u, p.s, p.vh, dtype=storage)


def expected(weight, x, scales, slots, bias):
    """In float64, from the matrices as they are stored."""
    u, _, vh = (f.double() for f in weight.change.factors())
    row_scales = scales.double()[slots].repeat_interleave(x.shape[0] // max(len(slots), 1), 0)
    y = x.double() @ weight.base.matrix().double().T + ((x.double() @ vh.T) * row_scales) @ u.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_the_definition(instruction_set, shape, dtype, storage):
    p, weight = delta(shape, storage)
    for batch in (0, 1, 7, 33):
        g = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, 2 * shape[2], generator=g).to(dtype)[:, ::2]
        slots = torch.randint(0, 5, (batch,), generator=g)
        bias = p.bias.to(dtype) if batch % 2 else None
        y = weight.linear(x, p.scales, slots, bias)
        want = expected(weight, x, p.scales, slots, bias)
        scale = max(1.0, float(want.abs().max())) if batch else 1.0
        limit = tolerance(dtype, storage)
        torch.testing.assert_close(y.double(), want, atol=limit * scale, rtol=limit)
        assert y.dtype == dtype


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_at_z_1_it_is_the_dense_product_bit_for_bit(instruction_set, storage, rounded, biased):
    shape = (577, 33, 1031)
    p = problem(shape, 40)
    w = torch.randn(577, 1031) / 32
    weight = DeltaWeight.pack(w, p.u, p.s, p.vh, dtype=storage, bf16_products=rounded)
    dense = DenseWeight.pack(w, dtype=storage, bf16_products=rounded)
    bias = p.bias if biased else None
    scales = p.scales.clone()
    scales[2] = 0
    for dtype in ACTIVATIONS:
        x = p.x.to(dtype)
        plain = dense.linear(x, bias)
        mixed = weight.linear(x, scales, p.ids, bias)
        assert torch.equal(mixed[p.ids == 2], plain[p.ids == 2])
        assert not torch.equal(mixed[p.ids == 1], plain[p.ids == 1])
        assert torch.equal(weight.base_unchecked(x, bias), plain)


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_bits_of_a_row_do_not_depend_on_its_batch(instruction_set, storage):
    p, weight = delta((131, 20, 577), storage)
    x = torch.randn(300, 577)
    slots = torch.arange(300) % 5
    whole = weight.linear(x, p.scales, slots, p.bias)
    for rows in (range(1), range(7), range(100, 113), range(299, 300), range(3, 270, 2)):
        part = weight.linear(x[list(rows)], p.scales, slots[list(rows)], p.bias)
        assert torch.equal(part, whole[list(rows)])


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_gradients_are_those_of_the_reference(instruction_set, storage):
    shape = (131, 20, 577)
    p, weight = delta(shape, storage)
    x, scales, bias = (t.clone().requires_grad_() for t in (p.x, p.scales, p.bias))
    slots = torch.tensor([3, 0, 3, 1])  # three rows each
    y = weight.linear_unchecked(x, scales, slots, bias)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad(y, (x, scales, bias), g)
    wide = [t.detach().double().requires_grad_() for t in (x, scales, bias)]
    want = torch.autograd.grad(expected(weight, wide[0], wide[1], slots, wide[2]), wide, g.double())
    for name, got, other in zip(("x", "scales", "bias"), grads, want, strict=True):
        # t meets activations of 16 or 8 bits
        limit = {torch.int8: 2e-3, torch.uint8: 2e-2, torch.int4: 2e-2}.get(storage, 1e-4)
        torch.testing.assert_close(got.double(), other, atol=limit * float(other.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_a_group_is_its_layers(instruction_set, storage):
    layers = [delta((out, rank, 70), storage, seed=i) for i, (out, rank) in enumerate(((20, 16), (9, 7), (40, 1)))]
    weights = [weight for _, weight in layers]
    scales, biases = [p.scales for p, _ in layers], [layers[0][0].bias, None, layers[2][0].bias]
    p = layers[0][0]
    together = linear_group(weights, p.x, scales, p.ids, biases)
    for y, weight, scale, bias in zip(together, weights, scales, biases, strict=True):
        assert torch.equal(y, weight.linear(p.x, scale, p.ids, bias))
    with pytest.raises(ValueError, match="weights: expected layers of one kind"):
        linear_group([weights[0], DeltaWeight.pack(nn.Linear(70, 3), *(layers[1][0].u[:3], p.s[:7], layers[1][0].vh))],
                     p.x, scales[:2], p.ids)  # fmt: skip


@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
def test_opcheck(storage):
    p, weight = delta((20, 18, 30), storage)
    base = (weight.base.weight, weight.base.row_scale)
    component = weight.change.component_scale
    args = (p.x, weight.change.u, weight.change.vh, component, p.scales, p.ids, p.bias, 20, False, *base)
    torch.library.opcheck(ops.factored_linear, args)
    trained = tuple(a.clone().requires_grad_() if i in (0, 4, 6) else a for i, a in enumerate(args))
    torch.library.opcheck(ops.factored_linear, trained)
    y, t = ops.factored_linear(*args)
    want, want_t = reference.factored_linear(*args)
    limit = max(1e-3, tolerance(torch.float32, storage))
    torch.testing.assert_close((y, t), (want, want_t), atol=limit * float(want_t.abs().max()), rtol=limit)
    torch.library.opcheck(ops.factored_linear_backward, (y, t, *args[1:6], 30, True, True, False, *base))
    scales = [] if base[1] is None else [base[1]]
    components = [] if component is None else [component]
    group = (p.x, weight.change.u, weight.change.vh, components, [p.scales], p.ids, [], [20], False, [base[0]], scales)
    torch.library.opcheck(ops.factored_linear_group, group)
    assert torch.equal(ops.factored_linear_group(*group)[0], weight.linear(p.x, p.scales, p.ids))
    lists = [group[i] for i in (1, 2, 3, 4, 6, 9, 10)]
    flat = (p.x, p.ids, [t for each in lists for t in each], [len(each) for each in lists], [20], False)
    torch.library.opcheck(ops.factored_linear_group_flat, flat)
    assert torch.equal(ops.factored_linear_group_flat(*flat)[0], weight.linear(p.x, p.scales, p.ids))
    with pytest.raises(RuntimeError, match="counts: expected"):
        ops.factored_linear_group_flat(*flat[:3], [len(flat[2])], *flat[4:])


def test_any_module_may_compute_the_base():
    """A quantised layer of another library keeps its kernels; what comes out of it gets the correction."""

    class Halved(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x.bfloat16()).to(x.dtype)

    p = problem((20, 6, 30), 12)
    base = Halved(nn.Linear(30, 20).bfloat16().requires_grad_(False))
    weight = DeltaWeight.pack(base, p.u, p.s, p.vh)
    scales = p.scales.clone()
    scales[0] = 0
    y = weight.linear(p.x, scales, p.ids)
    want = base(p.x).double() + ((p.x @ p.vh.T).double() * scales[p.ids].double()) @ p.u.double().T
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(y[p.ids == 0], base(p.x)[p.ids == 0])
    x = p.x.clone().requires_grad_()
    weight.linear_unchecked(x, scales, p.ids).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_storage_moves_with_its_owner_and_the_pair_has_that_of_the_base():
    p, weight = delta((20, 6, 30), torch.int8)
    assert (weight.dtype, weight.change.dtype, weight.change.parts) == (torch.int8, torch.int8, 1)
    before = weight.linear(p.x, p.scales, p.ids)
    cast = weight.to(torch.float16)
    assert torch.equal(cast.linear(p.x, p.scales, p.ids), before)
    other = DeltaWeight.pack(torch.zeros(20, 30), p.u, p.s, p.vh, dtype=torch.int8)
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other.linear(p.x, p.scales, p.ids), before)
    assert weight.nbytes == sum(t.nbytes for t in weight.state_dict().values())


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"base": torch.ones(20, 31)}, ValueError, r"base: expected shape \[20, 30\]"),
        ({"base": torch.full((20, 30), torch.nan)}, ValueError, "weight: expected finite values"),
        ({"base": "W"}, TypeError, "base: expected a tensor"),
        ({"u": torch.ones(20, 0)}, ValueError, "u: expected a non-empty matrix"),
        ({"s": torch.ones(5)}, ValueError, "s: expected shape"),
        ({"vh": torch.ones(5, 30)}, ValueError, r"vh: expected shape \[6, in\]"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected"),
    ],
)
def test_arguments_are_checked(change, kind, text):
    p = problem((20, 6, 30), 4)
    good = {"base": torch.ones(20, 30), "u": p.u, "s": p.s, "vh": p.vh}
    weight = DeltaWeight.pack(**good)
    with pytest.raises(kind, match=text):
        DeltaWeight.pack(**good | change)
    with pytest.raises(ValueError, match=r"scales: expected shape \[slots, 6\]"):
        weight.linear(p.x, p.scales[:, :5], p.ids)
    with pytest.raises(IndexError, match="slots: expected 0 <= id < 5"):
        weight.linear(p.x, p.scales, p.ids + 5)
