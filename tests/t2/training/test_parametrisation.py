from __future__ import annotations

import pytest
import torch

from t2.experts.layout import Layout
from t2.training.parametrisation import initial_parameters, z_from

LAYOUT = Layout(names=("a", "b", "c"), ranks=(5, 1, 7), fingerprint="f", base_model="m")


@pytest.mark.parametrize("kind", ["free", "sigmoid"])
def test_training_starts_at_the_base(kind: str):
    z = z_from(kind, initial_parameters(kind, LAYOUT), torch.rand(LAYOUT.R), LAYOUT)
    torch.testing.assert_close(z, torch.ones(LAYOUT.R))


def test_sigmoid_keeps_each_matrix_sum_of_singular_values():
    torch.manual_seed(0)
    sigma = torch.rand(LAYOUT.R)
    parameters = torch.randn(LAYOUT.R).requires_grad_()
    z = z_from("sigmoid", parameters, sigma, LAYOUT)
    for name in LAYOUT.names:
        window = LAYOUT.window(name)
        torch.testing.assert_close((sigma * z)[window].sum(), sigma[window].sum())
        gate = torch.sigmoid(parameters[window])
        torch.testing.assert_close(z[window], gate * sigma[window].sum() / (sigma[window] * gate).sum())
    (z * torch.randn(LAYOUT.R)).sum().backward()
    assert torch.isfinite(parameters.grad).all() and parameters.grad[:5].abs().min() > 0
    assert parameters.grad[5].abs() < 1e-6  # the only singular value of its matrix cannot change


def test_a_matrix_of_zeros_stays_finite():
    z = z_from("sigmoid", torch.randn(LAYOUT.R), torch.zeros(LAYOUT.R), LAYOUT)
    assert torch.isfinite(z).all()


def test_free_parameters_are_z():
    parameters = torch.randn(LAYOUT.R)
    assert z_from("free", parameters, torch.rand(LAYOUT.R), LAYOUT) is parameters


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected shape \[13\], got \[12\]"):
        z_from("free", torch.ones(12), torch.ones(13), LAYOUT)
