"""Bases for transfer are what they are called, and a run goes on only from figures of its own."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.adaptation.transfer import plot, quantised, resumed, with_noise


def generator():
    return torch.Generator().manual_seed(0)


def test_noise_has_its_size():
    weight = torch.randn(24, 40, generator=generator())
    noisy = with_noise(weight, torch.Generator().manual_seed(1), size=0.05)
    torch.testing.assert_close((noisy - weight).norm() / weight.norm(), torch.tensor(0.05))
    assert torch.equal(noisy, with_noise(weight, torch.Generator().manual_seed(1), size=0.05))
    assert not torch.equal(noisy, with_noise(weight, torch.Generator().manual_seed(2), size=0.05))


@pytest.mark.parametrize("bits, group", [(8, None), (4, 8), (4, None)])
def test_quantised_weights_are_within_half_a_step(bits, group):
    weight = torch.randn(6, 16, generator=generator())
    weight[0] = 0
    found = quantised(weight, generator(), bits=bits, group=group)
    groups, steps = weight.reshape(-1, group or 16), 2 ** (bits - 1) - 1
    error = (found - weight).reshape(groups.shape).abs().amax(1)
    assert bool((error <= groups.abs().amax(1) / steps / 2 * 1.001).all()) and float(error.max()) > 0
    for row in found.reshape(groups.shape):
        assert len(row.unique()) <= 2 * steps + 1


def test_figures_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "transfer.json"
    found = resumed(path, {"problems": 5})
    assert found["bases"] == {}
    path.write_text(json.dumps(found | {"bases": {"itself": {}}}))
    assert resumed(path, {"problems": 5})["bases"] == {"itself": {}}
    with pytest.raises(ValueError, match=r"results: .* was made with \{'problems': 5\}.*delete it"):
        resumed(path, {"problems": 6})


def test_plot_of_a_run_that_is_not_finished(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"accuracy": 0.5, "interval": [0.2, 0.8], "scores": [1, 0]}
    conditions = dict.fromkeys(("base", "ordered", "shuffled 0", "shuffled 1"), row)
    lines_up = {"vectors": {"q_proj": {"same": [0.5] * 8, "near": [0.9] * 8}}, "changes": {"a": {"ordered": 0.4}}}
    experts = {name: {"task": "sums"} for name in ("a", "b")}
    bases = {
        "itself": {"lines_up": lines_up, "experts": {"a": {"conditions": conditions}}},
        "other": {"lines_up": None, "experts": {"a": {"conditions": conditions}}},
    }
    plot({"settings": {"experts": experts}, "bases": bases}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
