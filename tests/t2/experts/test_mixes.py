"""Mixes of experts: names and z."""

from __future__ import annotations

import pytest
import torch

from t2.experts.mixes import mix_rows, parse_mix


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("sums:0.7+logic:0.3", {"sums": 0.7, "logic": 0.3}),
        ("sums:1e-1", {"sums": 0.1}),
        ("a:b:2", {"a:b": 2.0}),
        ("sums", None),
        ("sums:0.7+logic", None),
        ("sums:0.5+sums:0.5", None),
        ("sums:", None),
        ("", None),
    ],
)
def test_mixes_by_name(name, weights):
    assert parse_mix(name) == weights


@pytest.mark.parametrize("name", ["sums:1.2.3", "sums:e", "sums:11", "a:0.5+b:1e999"])
def test_weights_that_are_none(name):
    with pytest.raises(ValueError, match="expected"):
        parse_mix(name)


def test_a_mix_is_the_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    alpha, rows = torch.randn(4, 3, generator=generator), 1 + 0.1 * torch.randn(3, 50, generator=generator)
    torch.testing.assert_close(mix_rows(alpha, rows), alpha @ rows)


def test_a_mix_of_experts_on_a_support_is_on_it():
    generator = torch.Generator().manual_seed(1)
    rows = torch.ones(7, 40)
    rows[:, 3] = 1.1
    alpha = torch.rand(500, 7, generator=generator)
    alpha = alpha / alpha.sum(1, keepdim=True)
    mixed = mix_rows(alpha, rows)
    mixed[:, 3] = 1
    assert torch.equal(mixed, torch.ones(500, 40))
    plain = alpha @ rows
    assert bool((plain[:, 5] != 1).any())  # which the plain sum is not
    assert torch.equal(mix_rows(torch.tensor([[0.5, 0.4]]), torch.ones(2, 3)), torch.full((1, 3), 0.9))
