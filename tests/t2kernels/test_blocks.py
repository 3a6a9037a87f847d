"""Matrices in blocks: exact products of rounded activations, and weights that are as near as their bits allow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from t2kernels import DeltaWeight, DenseWeight, FactoredWeight
from t2kernels.packing import BLOCK_BYTES, LEVELS, lay_out
from tests.t2kernels.problems import SHAPES, problem


def rounded(x):
    """Activations as products with blocks see them: integers up to 127 with a scale for every 32 terms."""
    blocks = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    steps = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    return (steps.double() * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", LEVELS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(instruction_set, shape, dtype):
    out, _, inputs = shape
    weight = DenseWeight.pack(torch.randn(out, inputs, generator=torch.Generator().manual_seed(1)), dtype=dtype)
    for batch in (0, 1, 2, 7, 12, 13, 33, 300):
        x = problem(shape, batch).x
        want = rounded(x) @ weight.matrix().double().T
        torch.testing.assert_close(weight.linear(x).double(), want, atol=3e-6 * inputs**0.5, rtol=0)


@pytest.mark.parametrize("dtype", LEVELS, ids=str)
def test_the_largest_codes_and_activations_do_not_overflow(instruction_set, dtype):
    w = torch.full((40, 577), 1.0)
    w[:, ::32] = -1.0  # so that all others have the largest code
    for x in (torch.full((13, 577), 127.0), torch.full((13, 577), -127.0)):
        weight = DenseWeight.pack(w, dtype=dtype)
        torch.testing.assert_close(
            weight.linear(x).double(), x.double() @ weight.matrix().double().T, atol=0.05, rtol=1e-6
        )


@pytest.mark.parametrize("dtype", LEVELS, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_weights_of_any_size_are_near(dtype, size):
    w = torch.randn(50, 333) * size
    w[7] = 0
    w[9, 32:64] = 0.25 * size
    w[11] *= torch.logspace(-3, 0, 333)
    stored = DenseWeight.pack(w, dtype=dtype).matrix()
    bound = w.abs().amax(1, keepdim=True) * {torch.int4: 0.15, torch.uint8: 0.005}[dtype]
    assert bool(((stored - w).abs() <= bound).all())
    assert not stored[7].any()


def test_weights_of_q4_1_are_kept_as_they_are():
    """Scale and minimum in float16 and codes from 0 to 15, with both ends in use, are found again."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (70, 18, 32), generator=g).float()
    codes[..., 3], codes[..., 30] = 0, 15
    scale = (torch.rand(70, 18, 1, generator=g) * 0.01 + 1e-4).half().float()
    minimum = (-8 * scale * (1 + 0.1 * torch.randn(70, 18, 1, generator=g))).half().float()
    w = (scale * codes + minimum).flatten(1)
    assert torch.equal(DenseWeight.pack(w, dtype=torch.int4).matrix(), w)
    ragged = w[:, :517]
    assert torch.equal(DenseWeight.pack(ragged, dtype=torch.int4).matrix()[:, :512], ragged[:, :512])


def test_four_bits_lose_less_than_the_range_alone_would():
    w = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    blocks = w.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = (((blocks - low) / step).round() * step + low).flatten(1)
    stored = DenseWeight.pack(w, dtype=torch.int4).matrix()
    assert float((stored - w).norm()) < 0.97 * float((plain - w).norm())


@pytest.mark.parametrize("dtype", LEVELS, ids=str)
def test_values_that_are_not_finite_spoil_their_row_alone(instruction_set, dtype):
    weight = DenseWeight.pack(torch.randn(33, 100), dtype=dtype)
    x = torch.randn(14, 100)
    clean = weight.linear(x)
    x[3, 50], x[8, 99] = torch.nan, torch.inf
    y = weight.linear(x)
    others = [row for row in range(14) if row not in (3, 8)]
    assert torch.equal(y[others], clean[others]) and bool(y[[3, 8]].isnan().all())


def test_bytes_and_names():
    for dtype, bytes_ in BLOCK_BYTES.items():
        weight = DenseWeight.pack(torch.randn(576, 576), dtype=dtype)
        assert weight.dtype == dtype and weight.nbytes == 36 * 18 * bytes_ + 4 * 576
    p = problem((40, 20, 70), 3)
    delta = DeltaWeight.pack(torch.randn(40, 70), p.u, p.s, p.vh, dtype=torch.int4)
    assert (delta.dtype, delta.change.dtype) == (torch.int4, torch.uint8)
    again = DeltaWeight.pack(torch.zeros(40, 70), p.u, p.s, p.vh, dtype=torch.int4)
    again.load_state_dict(delta.to(torch.float16).state_dict())
    assert torch.equal(again.linear(p.x, p.scales, p.ids), delta.linear(p.x, p.scales, p.ids))


def test_factors_in_four_bits_are_refused_and_so_is_a_device_without_kernels():
    p = problem((40, 20, 70), 3)
    with pytest.raises(TypeError, match=r"on a CPU uint8, .* got torch.int4"):
        FactoredWeight.pack(p.u, p.s, p.vh, dtype=torch.int4)
    with pytest.raises(ValueError, match="weight: expected a CPU, as meta has no kernels for matrices in blocks"):
        lay_out(DenseWeight.pack(torch.randn(4, 4), dtype=torch.int4).weight.to("meta"), 4, 4)
