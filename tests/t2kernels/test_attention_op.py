"""Decode attention against float64, over instruction sets, dtypes, ragged lengths, masks and strides."""

from __future__ import annotations

import pytest
import torch

import t2kernels
from t2kernels import reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [  # rows, key heads, query heads of each, length, head_dim
    (1, 1, 1, 1, 16),
    (3, 2, 5, 7, 48),
    (2, 3, 3, 577, 64),
    (1, 1, 8, 1031, 80),
    (17, 4, 1, 33, 128),
]


def problem(rows, key_heads, group, length, head_dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, key_heads * group, 1, head_dim, generator=g).to(dtype)
    key, value = (torch.randn(rows, key_heads, length, head_dim, generator=g).to(dtype) for _ in range(2))
    return query, key, value


def truth(query, key, value, allowed=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.decode_attention(query.double(), key.double(), value.double(), allowed, scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64(extreme_set, dtype, shape, masked):
    query, key, value = problem(*shape, dtype)
    allowed = None
    if masked:
        allowed = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(1)) > 0.4
        allowed[:, -1] = True
    y = t2kernels.decode_attention(query, key, value, allowed)
    assert y.shape == (shape[0], 1, query.shape[1], shape[4]) and y.is_contiguous() and y.dtype == dtype
    torch.testing.assert_close(y.double(), truth(query, key, value, allowed), rtol=0, atol=TOLERANCE[dtype])


def test_sharp_and_flat_scores(instruction_set):
    """Softmax where one key takes all, where scores differ by hundreds, and where all are equal."""
    query, key, value = problem(2, 2, 2, 77, 32)
    for scale in (0.0, 1e-3, 30.0, -30.0):
        y = t2kernels.decode_attention(query, key, value, scale=scale)
        torch.testing.assert_close(y.double(), truth(query, key, value, scale=scale), rtol=0, atol=2e-5)


def test_a_row_that_may_look_nowhere_gives_zeros_and_disturbs_nobody(instruction_set):
    query, key, value = problem(3, 2, 2, 20, 32)
    allowed = torch.ones(3, 20, dtype=torch.bool)
    allowed[1] = False
    y = t2kernels.decode_attention(query, key, value, allowed)
    assert not y[1].any()
    assert torch.equal(y[[0, 2]], t2kernels.decode_attention(query, key, value)[[0, 2]])
    no_keys = t2kernels.decode_attention(query, key[:, :, :0], value[:, :, :0])
    assert no_keys.shape == y.shape and not no_keys.any()


def test_not_a_number_reaches_its_own_row_only(instruction_set):
    query, key, value = problem(3, 2, 2, 20, 32)
    clean = t2kernels.decode_attention(query, key, value)
    key[1, 0, 5, 3] = torch.nan
    y = t2kernels.decode_attention(query, key, value)
    assert y[1, 0, :2].isnan().all() and torch.equal(y[1, 0, 2:], clean[1, 0, 2:])
    assert torch.equal(truth(query, key, value).isnan(), y.isnan())
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_strides(instruction_set):
    """Views of a larger buffer, heads inside tokens, a last dimension that is not contiguous, an expanded mask."""
    query, key, value = problem(3, 2, 2, 20, 32)
    expected = t2kernels.decode_attention(query, key, value)
    roomy = torch.full((3, 2, 50, 32), torch.nan)
    roomy[:, :, :20] = key
    inside = value.transpose(1, 2).contiguous().transpose(1, 2)
    columns = query.transpose(1, 3).contiguous().transpose(1, 3)
    allowed = torch.ones(1, 1, dtype=torch.bool).expand(3, 20)
    assert torch.equal(t2kernels.decode_attention(columns, roomy[:, :, :20], inside, allowed), expected)


def test_bits_do_not_depend_on_batch_padding_or_threads(instruction_set, threads):
    query, key, value = problem(5, 3, 3, 300, 64)
    allowed = torch.ones(5, 300, dtype=torch.bool)
    lengths = [300, 299, 131, 17, 1]
    for row, length in enumerate(lengths):
        allowed[row, : 300 - length] = False
    threads(2)
    together = t2kernels.decode_attention(query, key, value, allowed)
    threads(1)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = t2kernels.decode_attention(query[one], key[one, :, 300 - length :], value[one, :, 300 - length :])
        assert torch.equal(alone, together[one]), length


def test_empty_batch():
    query, key, value = problem(0, 2, 2, 20, 32)
    assert t2kernels.decode_attention(query, key, value).shape == (0, 1, 4, 32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(3, 4, 2, 32)}, ValueError, r"query: expected shape \[rows, heads, 1, head_dim\]"),
        ({"query": torch.zeros(3, 4, 1, 20)}, ValueError, "query: .*multiple of 16"),
        ({"query": torch.zeros(3, 5, 1, 32)}, ValueError, "key: .*divisor of 5"),
        ({"key": torch.zeros(3, 2, 20, 32).half()}, TypeError, "key: expected dtype float32"),
        ({"value": torch.zeros(3, 2, 21, 32)}, ValueError, "value: expected shape"),
        ({"value": None}, TypeError, "value: expected a tensor"),
        ({"allowed": torch.ones(3, 20)}, TypeError, "allowed: expected dtype bool"),
        ({"allowed": torch.ones(3, 19, dtype=torch.bool)}, ValueError, "allowed: expected shape"),
        ({"key": torch.zeros(3, 2, 20, 32, requires_grad=True)}, ValueError, "key: expected requires_grad=False"),
    ],
)
def test_errors(change, error, message):
    query, key, value = problem(3, 2, 2, 20, 32)
    with pytest.raises(error, match=message):
        t2kernels.decode_attention(**({"query": query, "key": key, "value": value} | change))


def test_registered_operator():
    query, key, value = problem(3, 2, 2, 20, 32)
    allowed = torch.ones(3, 20, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.t2kernels.decode_attention.default,
        (query, key, value, allowed, 0.1),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_rows_may_look_at_any_row_of_keys(instruction_set):
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(5, 2, 70, 32, generator=generator) for _ in range(2))
    rows = torch.tensor([4, 0, 4, 4, 2])
    query = torch.randn(5, 6, 1, 32, generator=generator)
    lengths = torch.tensor([70, 1, 33, 34, 64])
    allowed = torch.arange(70) < lengths[:, None]
    together = t2kernels.decode_attention(query, key, value, allowed, key_rows=rows)
    torch.testing.assert_close(
        together, reference.decode_attention(query, key, value, allowed, 32**-0.5, rows), atol=1e-5, rtol=1e-5
    )
    for i, length in enumerate(lengths.tolist()):
        own = slice(rows[i], rows[i] + 1)
        alone = t2kernels.decode_attention(query[i : i + 1], key[own, :, :length], value[own, :, :length])
        assert torch.equal(together[i : i + 1], alone)  # also without what lies behind the last key
    for wrong in (torch.tensor([0, 0, 0, 0, 5]), torch.tensor([-1, 0, 0, 0, 0])):
        with pytest.raises(ValueError, match="key_rows: expected 0 <= row < 5"):
            t2kernels.decode_attention(query, key, value, key_rows=wrong)
        with pytest.raises(RuntimeError, match="key_rows: entry"):
            torch.ops.t2kernels.decode_attention(query, key, value, None, 1.0, wrong)
    with pytest.raises(ValueError, match="key_rows"):
        t2kernels.decode_attention(query, key, value, key_rows=rows[:4])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 64), (5, 48), (13, 32)], ids=str)
def test_rows_that_share_keys_have_the_bits_of_each_alone(extreme_set, dtype, shape):
    """Rows that look at ranges of any length, with holes, far from each other, and at nothing."""
    group, head_dim = shape
    generator = torch.Generator().manual_seed(group)
    key, value = (torch.randn(3, 2, 90, head_dim, generator=generator).to(dtype) for _ in range(2))
    rows = torch.tensor([1] * 20 + [0] + [2] * 3 + [1] * 6)
    query = torch.randn(len(rows), 2 * group, 1, head_dim, generator=generator).to(dtype)
    begin = torch.randint(0, 90, (len(rows), 1), generator=generator)
    length = torch.randint(0, 90, (len(rows), 1), generator=generator)
    keys = torch.arange(90)
    allowed = (keys >= begin) & (keys < begin + length)
    allowed[20:] &= torch.rand(len(rows) - 20, 90, generator=generator) > 0.3
    allowed[4] = allowed[22] = False
    together = t2kernels.decode_attention(query, key, value, allowed, key_rows=rows)
    expected = reference.decode_attention(query.double(), key.double(), value.double(), allowed, head_dim**-0.5, rows)
    torch.testing.assert_close(together.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert not together[4].any() and not together[22].any()
    ranges = torch.cat([begin, (begin + length).clamp_max(90)], 1)
    assert torch.equal(
        t2kernels.decode_attention(query, key, value, None, key_rows=rows, key_ranges=ranges)[5:20], together[5:20]
    )
    assert torch.equal(
        t2kernels.decode_attention(query, key, value, allowed, key_rows=rows, key_ranges=ranges), together
    )
    apart = allowed.t().contiguous().t()  # the kernel skips contiguous masks faster
    assert torch.equal(t2kernels.decode_attention(query, key, value, apart, key_rows=rows), together)
    for i, row in enumerate(rows.tolist()):
        places = allowed[i].nonzero()
        if len(places):
            inside = slice(int(places.min()), int(places.max()) + 1)
            one = slice(i, i + 1), slice(row, row + 1)
            alone = t2kernels.decode_attention(
                query[one[0]], key[one[1], :, inside], value[one[1], :, inside], allowed[one[0], inside]
            )
            assert torch.equal(alone, together[one[0]]), i


def test_what_lies_beyond_a_rows_keys_does_not_reach_it(instruction_set):
    """Rows that share keys look at different parts of them; keys that only others see are not a number."""
    query, key, value = problem(8, 2, 3, 40, 32)
    rows = torch.zeros(8, dtype=torch.int64)
    allowed = torch.arange(40) <= torch.arange(8)[:, None] + 20
    clean = t2kernels.decode_attention(query, key, value, allowed, key_rows=rows)
    key[:, :, 25:], value[:, :, 25:] = torch.nan, torch.nan
    y = t2kernels.decode_attention(query, key, value, allowed, key_rows=rows)
    assert torch.equal(y[:5], clean[:5]) and y[5:].isnan().all()


def test_ranges_of_keys(instruction_set):
    query, key, value = problem(4, 2, 2, 20, 32)
    ranges = torch.tensor([[0, 20], [3, 17], [5, 5], [19, 20]])
    y = t2kernels.decode_attention(query, key, value, key_ranges=ranges)
    expected = reference.decode_attention(query, key, value, None, 32**-0.5, None, ranges)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=0)
    assert not y[2].any()
    for wrong in ([[0, 21]], [[-1, 3]], [[4, 3]]):
        given = torch.tensor(wrong * 4)
        with pytest.raises(ValueError, match="key_ranges: expected 0 <= begin <= end <= 20"):
            t2kernels.decode_attention(query, key, value, key_ranges=given)
        with pytest.raises(RuntimeError, match="key_ranges: entry 0"):
            torch.ops.t2kernels.decode_attention(query, key, value, None, 1.0, None, given)
    with pytest.raises(ValueError, match="key_ranges: expected shape"):
        t2kernels.decode_attention(query, key, value, key_ranges=ranges[:3])
