"""The cache layer that grows in place, beside the one of transformers that it stands in for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from t2.model.kv_cache import GrowingLayer, growing_cache


class TestGrowingLayer:
    def steps(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        return [tuple(torch.randn(2, 3, n, 16, generator=g) for _ in range(2)) for n in (5, 1, 1, 70, 1, 200, 1)]

    def assert_same(self, ours, theirs):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()

    def test_holds_what_a_dynamic_layer_holds(self):
        ours, theirs = GrowingLayer(), DynamicLayer()
        for step in self.steps():
            for a, b in zip(ours.update(*step), theirs.update(*step), strict=True):
                assert torch.equal(a, b)
        self.assert_same(ours, theirs)

    def test_writes_in_place_while_there_is_room(self):
        layer, steps = GrowingLayer(), self.steps()
        layer.update(*steps[0])
        before = layer.keys.data_ptr()
        layer.update(*steps[1])
        assert layer.keys.data_ptr() == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.crop(-3),
            lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
            lambda layer: layer.batch_select_indices(torch.tensor([1])),
            lambda layer: layer.batch_repeat_interleave(2),
            lambda layer: layer.reset(),
        ],
        ids=["crop", "reorder", "select", "repeat", "reset"],
    )
    def test_survives_changes_from_outside(self, change):
        ours, theirs = GrowingLayer(), DynamicLayer()
        steps = self.steps()
        for layer in (ours, theirs):
            layer.update(*steps[0])
            layer.update(*steps[1])
            change(layer)
        rows = 2 if theirs.keys is None else theirs.keys.shape[0]
        for step in steps[2:5]:
            new = [torch.cat([t, t])[:rows] for t in step]
            ours.update(*new)
            theirs.update(*new)
        self.assert_same(ours, theirs)

    def test_a_copy_grows_on_its_own(self):
        layer, steps = GrowingLayer(), self.steps()
        layer.update(*steps[0])
        other = copy.deepcopy(layer)
        layer.update(*steps[1])
        other.update(*steps[2])
        assert torch.equal(layer.keys[:, :, 5:], steps[1][0]) and torch.equal(other.keys[:, :, 5:], steps[2][0])


def test_caches_that_are_left_to_generate(tiny_model):
    assert growing_cache(torch.nn.Linear(2, 2)) is None
    assert all(type(layer) is GrowingLayer for layer in growing_cache(tiny_model()).layers)
    assert not any(type(layer) is GrowingLayer for layer in growing_cache(tiny_model("mistral")).layers)
