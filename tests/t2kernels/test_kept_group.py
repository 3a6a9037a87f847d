"""Groups that are handed in once and called by number give the bits of `linear_group`, side by side."""

from __future__ import annotations

import gc
from itertools import accumulate

import pytest
import torch

from t2kernels import DeltaWeight, FactoredWeight, linear_group
from t2kernels.backends import extension
from t2kernels.packing import INT4
from t2kernels.pages import HUGE_PAGE, collapse_pages
from t2kernels.weights import KeptGroup, grouped_linear

pytestmark = pytest.mark.skipif(extension is None, reason="needs the C++ extension")
SIZES = ((48, 40), (7, 40), (130, 40))


def layers(form, storage, generator):
    made = []
    for out, inside in SIZES:
        rank = min(out, inside) if form == "factored" else 5
        u, s = torch.randn(out, rank, generator=generator), torch.rand(rank, generator=generator)
        vh = torch.randn(rank, inside, generator=generator)
        if form == "factored":
            made.append(FactoredWeight.pack(u, s, vh, dtype=storage))
        else:
            made.append(DeltaWeight.pack(torch.randn(out, inside, generator=generator), u, s, vh, dtype=storage))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "storage"),
    [
        *[("factored", storage) for storage in (torch.float32, torch.bfloat16, torch.int8)],
        *[("delta", storage) for storage in (torch.float32, torch.bfloat16, torch.int8, torch.uint8, INT4)],
    ],
)
def test_bits_of_the_group(form, storage, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = layers(form, storage, generator)
    scales = [torch.randn(4, weight.rank, generator=generator) for weight in weights]
    biases = [torch.randn(48, generator=generator), None, torch.randn(130, generator=generator).to(dtype)]
    kept = KeptGroup(weights, scales, biases)
    for rows in (0, 1, 7, 33):
        x = torch.randn(rows, 40, generator=generator).to(dtype)
        slots = torch.randint(4, (rows,), generator=generator)
        wanted = torch.cat(linear_group(weights, x, scales, slots, biases), -1)
        assert torch.equal(kept.linear_unchecked(x, slots), wanted)
        strided = torch.randn(rows, 80, generator=generator).to(dtype)[:, ::2]
        wanted = torch.cat(linear_group(weights, strided, scales, slots, biases), -1)
        assert torch.equal(kept.linear_unchecked(strided, slots), wanted)
        for scale in scales:
            scale.normal_(generator=generator)  # read where they are


@torch.compile(backend="eager", fullgraph=True)
def compiled(kept, x, slots):
    return kept.linear_unchecked(x, slots).relu()


def test_it_traces_and_ends_with_its_owner():
    generator = torch.Generator().manual_seed(1)
    weights = layers("delta", torch.float32, generator)
    scales = [torch.randn(2, weight.rank, generator=generator) for weight in weights]
    kept = KeptGroup(weights, scales, [None] * 3)
    x, slots = torch.randn(3, 40, generator=generator), torch.tensor([1, 0, 1])
    wanted = kept.linear_unchecked(x, slots)
    assert torch.equal(compiled(kept, x, slots), wanted.relu())
    with pytest.raises(RuntimeError, match="out_features: expected 185, got 3"):
        torch.ops.t2kernels.kept_group_linear(x, slots, kept._number, 3)
    number = kept._number
    del kept
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="group: expected one that is kept"):
        torch.ops.t2kernels.kept_group_linear(x, slots, number, 185)


def test_pages_keep_their_contents():
    big = torch.arange(3 * HUGE_PAGE // 4, dtype=torch.int32)
    wanted, address = big.clone(), big.data_ptr()
    moved = collapse_pages([big, torch.empty(0), torch.empty(5, 5).T, torch.empty(3, device="meta")])
    assert moved % HUGE_PAGE == 0
    assert torch.equal(big, wanted)
    assert big.data_ptr() == address


def test_stretches_of_rows_go_through_groups_of_their_own():
    generator = torch.Generator().manual_seed(0)
    made = [layers("factored", torch.bfloat16, generator) for _ in range(4)]
    scales = [[torch.randn(3, weight.rank, generator=generator) for weight in weights] for weights in made]
    groups = [KeptGroup(weights, own, [None] * 3) for weights, own in zip(made, scales, strict=True)]
    for counts in ((0, 0, 0, 0), (1, 0, 7, 33), (0, 5, 0, 0)):
        offsets = [0, *accumulate(counts)]
        x = torch.randn(offsets[-1], 80, generator=generator)[:, ::2]
        slots = torch.randint(3, (offsets[-1],), generator=generator)
        found = grouped_linear(groups, x, slots, offsets)
        for group, first, last in zip(groups, offsets, offsets[1:], strict=False):
            assert torch.equal(found[first:last], group.linear_unchecked(x[first:last], slots[first:last]))


@pytest.mark.parametrize(
    ("offsets", "slots", "said"),
    [
        ([0, 2, 3], 3, "offsets"),
        ([0, 2, 1, 3, 3], 3, "increasing"),
        ([0, 1, 2, 3, 3], 2, "slots"),
        ([0, 1, 1, 1, 1], 3, "offsets"),
    ],
)
def test_stretches_that_do_not_fit_are_refused(offsets, slots, said):
    generator = torch.Generator().manual_seed(0)
    weights = layers("factored", torch.float32, generator)
    groups = [KeptGroup(weights, [torch.ones(1, weight.rank) for weight in weights], [None] * 3)] * 4
    with pytest.raises(RuntimeError, match=said):
        grouped_linear(groups, torch.ones(3, 40), torch.zeros(slots, dtype=torch.int64), offsets)
    other = KeptGroup(weights[:1], [torch.ones(1, weights[0].rank)], [None])
    with pytest.raises(ValueError, match="equally wide"):
        grouped_linear([groups[0], other], torch.ones(0, 40), torch.zeros(0, dtype=torch.int64), [0, 0, 0])
