"""Operators without features, ranks or rows, in forward mode, under torch.func, and differentiated twice."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import t2kernels
from t2kernels import FactoredWeight, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "rank", "outer"),
    [size for size in itertools.product((0, 2), (0, 5), (0, 3), (0, 7)) if 0 in size],
    ids=str,
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_sizes_of_zero_give_what_plain_torch_gives(rows, inner, rank, outer, dtype, with_bias):
    x, u, vh = random(rows, inner, dtype=dtype), random(outer, rank, dtype=dtype), random(rank, inner, dtype=dtype)
    scales, slots = random(2, rank), torch.zeros(rows, dtype=torch.int64)
    bias = random(outer, dtype=dtype, seed=1) if with_bias else None
    y, t = ops.factored_linear(x, [u], [vh], None, scales, slots, bias, outer, False, None, None)
    want, want_t = reference.factored_linear(x, [u], [vh], None, scales, slots, bias, outer, False)
    torch.testing.assert_close(y, want, atol=0.05, rtol=0.05)
    torch.testing.assert_close(t, want_t, atol=0.05, rtol=0.05)
    given = [] if bias is None else [bias, bias]
    for other in ops.factored_linear_group(
        x, [u, u], [vh, vh], [], [scales, scales], slots, given, [outer, outer], False, [], []
    ):
        assert torch.equal(other, y)
    g = random(rows, outer, dtype=dtype)
    got = ops.factored_linear_backward(g, t, [u], [vh], None, scales, slots, inner, True, True, False, None, None)
    wanted = reference.factored_linear_backward(g, t, [u], [vh], None, scales, slots, inner, True, True, False)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
    w = random(outer, inner, dtype=dtype)
    want = reference.dense_linear(x, w, None, bias, outer, False)
    torch.testing.assert_close(ops.dense_linear(x, w, None, bias, outer, False), want, atol=0.05, rtol=0.05)
    want = reference.dense_linear_backward(g, w, None, inner, False)
    torch.testing.assert_close(ops.dense_linear_backward(g, w, None, inner, False), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 16, 5), (2, 0, 16, 5), (2, 4, 0, 5), (2, 4, 16, 0)], ids=str)
def test_decode_attention_without_rows_heads_or_keys(shape, dtype):
    rows, heads, dim, length = shape
    query = random(rows, heads, 1, dim, dtype=dtype)
    key = random(rows, max(1, heads // 2), length, dim, dtype=dtype)
    out = torch.ops.t2kernels.decode_attention(query, key, key, None, 1.0)
    assert out.shape == (rows, 1, heads, dim) and not out.any()


X, U, S, VH, Z = random(4, 10), random(7, 5, seed=1), random(5, seed=2), random(5, 10, seed=3), random(5, seed=4)
PACKED = FactoredWeight.pack(U, S, VH)
SLOTS = torch.zeros(1, dtype=torch.int64)
WAYS = {
    "svf_linear": lambda x, z: t2kernels.svf_linear(x, U, S, VH, z),
    "FactoredWeight": lambda x, z: PACKED.linear_unchecked(x, (S * z).unsqueeze(0), SLOTS),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def plain(x, z):
    return (x @ VH.T * (S * z)) @ U.T


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@ways
def test_forward_mode(way):
    for function in (lambda f: torch.func.jvp(lambda z: f(X, z), (Z,), (Z,))[1], dual):
        close(function(way), function(plain))


def dual(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, X), Z)).tangent


@ways
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd])
def test_transforms(way, transform):
    close(transform(lambda z: way(X, z).square().sum())(Z), transform(lambda z: plain(X, z).square().sum())(Z))


def test_vmap():
    several = torch.stack([Z, 2 * Z])
    close(torch.vmap(lambda z: WAYS["svf_linear"](X, z))(several), torch.vmap(lambda z: plain(X, z))(several))


@ways
@pytest.mark.parametrize("wrt", ["x", "z"])
def test_a_gradient_of_a_gradient_is_refused(way, wrt):
    x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
    of = {"x": x, "z": z}[wrt]
    (gradient,) = torch.autograd.grad(way(x, z).square().sum(), of, create_graph=True)
    close(gradient, torch.autograd.grad(plain(x, z).square().sum(), of)[0])
    with pytest.raises(NotImplementedError, match="second time"):
        gradient.square().sum().backward()


@ways
def test_a_mixed_second_derivative_is_refused(way):
    x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(way(x, z).sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="second time"):
        torch.autograd.grad(gradient.sum(), x)
    dense = torch.ops.t2kernels.dense_linear(x, random(3, 10), None, None, 3, False)
    (gradient,) = torch.autograd.grad(dense.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second time"):
        gradient.sum().backward()
