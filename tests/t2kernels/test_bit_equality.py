"""Instruction sets beside the widest one, bit for bit; the portable set and bfloat16 products round otherwise.

All sets but the portable one add one fused term after the other in the same order, so their bits agree, forward and
backward. `portable` rounds each product, and the hardware's dot products of bfloat16, where factors and activations are
both bfloat16, round in an order of their own: test_kernels.py compares these two with float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import t2kernels
from t2kernels import DenseWeight, FactoredWeight, linear_group, svf_linear
from tests.t2kernels.conftest import HARDWARE_DOTS, INSTRUCTION_SETS, WIDEST
from tests.t2kernels.problems import ACTIVATIONS, BATCHES, DENSE_STORAGE, SHAPES, STORAGE, problem, tolerance

FUSED = [isa for isa in INSTRUCTION_SETS if isa not in ("portable", WIDEST)]
pytestmark = pytest.mark.skipif(not FUSED, reason="needs a processor with two sets of fused multiply-adds")


def assert_all_sets_agree(run: Callable[[], tuple[Tensor, ...]], bf16_dots: bool = False) -> None:
    """`run` gives the same bits on every set; with `bf16_dots`, on every set without such products, near the others."""
    before, results = t2kernels.build_info()["chosen"], {}
    try:
        for isa in (WIDEST, *FUSED):
            t2kernels.select_instruction_set(isa)
            results[isa] = run()
    finally:
        t2kernels.select_instruction_set(before)
    rounded = [results.pop(isa) for isa in HARDWARE_DOTS & results.keys()] if bf16_dots else []
    first, *others = results.values()
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)
    for other in rounded:
        for one, two in zip(first, other, strict=True):
            bound = tolerance(torch.bfloat16) * max(1.0, float(one.abs().max()) if one.numel() else 0.0)
            torch.testing.assert_close(two.float(), one.float(), atol=bound, rtol=tolerance(torch.bfloat16))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_weights(shape, storage, dtype):
    for batch in BATCHES:
        p = problem(shape, batch, dtype=dtype)
        weight = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
        assert_all_sets_agree(
            lambda p=p, weight=weight: (weight.linear(p.x, p.scales, p.ids, p.bias),),
            bf16_dots=storage == dtype == torch.bfloat16,
        )


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", DENSE_STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_weights(shape, storage, dtype):
    out, _, inputs = shape
    weight = DenseWeight.pack(torch.randn(out, inputs, generator=torch.Generator().manual_seed(3)), dtype=storage)
    for batch in BATCHES:
        p = problem(shape, batch, dtype=dtype)
        assert_all_sets_agree(lambda p=p: (weight.linear(p.x, p.bias),), bf16_dots=storage == dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, storage, dtype):
    for batch in (0, 1, 7, 33):
        p = problem(shape, batch, dtype=dtype)
        weight = FactoredWeight.pack(p.u, p.s, p.vh, dtype=storage)
        g = torch.randn(batch, shape[0], generator=torch.Generator().manual_seed(7)).to(dtype)

        def gradients(p=p, weight=weight, g=g):
            inputs = [t.clone().requires_grad_() for t in (p.x, p.scales, p.bias)]
            weight.linear(*inputs[:2], p.ids, inputs[2]).backward(g)
            return tuple(t.grad for t in inputs)

        assert_all_sets_agree(gradients, bf16_dots=storage == dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_factors(shape, dtype):
    for batch in (0, 1, 7, 33):
        p = problem(shape, batch, dtype=dtype)
        assert_all_sets_agree(lambda p=p: (svf_linear(p.x, p.u, p.s, p.vh, p.z, p.bias, expert_ids=p.ids),))


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("storage", STORAGE, ids=str)
def test_groups(storage, dtype):
    for batch in (0, 1, 7, 33):
        problems = [problem((33 + 16 * i, 80 - i, 577), batch, seed=i, dtype=dtype) for i in range(3)]
        weights = [FactoredWeight.pack(q.u, q.s, q.vh, dtype=storage) for q in problems]
        x, ids = problems[0].x, problems[0].ids
        assert_all_sets_agree(
            lambda w=weights, x=x, ids=ids, q=problems: tuple(linear_group(w, x, [p.scales for p in q], ids)),
            bf16_dots=storage == dtype == torch.bfloat16,
        )


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_decode_attention(dtype, masked):
    generator = torch.Generator().manual_seed(0)
    for rows, key_heads, group, length, dim in [
        (1, 1, 1, 1, 16),
        (3, 2, 5, 7, 48),
        (2, 3, 3, 577, 64),
        (1, 1, 8, 1031, 80),
    ]:
        query = torch.randn(rows, key_heads * group, 1, dim, generator=generator).to(dtype)
        key, value = (torch.randn(rows, key_heads, length, dim, generator=generator).to(dtype) for _ in range(2))
        allowed = torch.rand(rows, length, generator=generator) > 0.4 if masked else None
        assert_all_sets_agree(
            lambda q=query, k=key, v=value, allowed=allowed: (t2kernels.decode_attention(q, k, v, allowed),)
        )


@pytest.mark.parametrize("isa", [isa for isa in FUSED if isa not in HARDWARE_DOTS])
def test_bfloat16_on_bfloat16_without_the_hardwares_products(isa):
    """Exact products of widened values: the bits of float32 storage and activations, rounded at the end."""
    before = t2kernels.build_info()["chosen"]
    t2kernels.select_instruction_set(isa)
    try:
        for shape in SHAPES:
            p = problem(shape, 33, dtype=torch.bfloat16)
            narrow = DenseWeight.pack(p.u, dtype=torch.bfloat16)
            wide = DenseWeight.pack(p.u.float(), dtype=torch.float32)
            x = torch.randn(33, shape[1], generator=torch.Generator().manual_seed(5)).bfloat16()
            assert torch.equal(narrow.linear(x), wide.linear(x.float()).bfloat16())
    finally:
        t2kernels.select_instruction_set(before)
