"""The two published parametrisations: from trainable parameters p [R] to z [R]."""

from __future__ import annotations

import torch
from torch import Tensor

from t2.experts.layout import Layout
from t2.training.options import Parametrisation

SIGMOID_START = 0.1


def initial_parameters(kind: Parametrisation, layout: Layout) -> Tensor:
    """p [R] float32 at which z = 1: the base model (the published runs add noise of 0.01 to theirs)."""
    return torch.ones(layout.R) if kind == "free" else torch.full((layout.R,), SIGMOID_START)


def z_from(kind: Parametrisation, parameters: Tensor, sigma: Tensor, layout: Layout) -> Tensor:
    """z [R] of parameters p [R], with their gradient.

    free: z = p. sigmoid: z = c sigmoid(p), where each matrix has the c = sum(sigma) / sum(sigma sigmoid(p)) that keeps
    the sum of its singular values, as the published code's `compose_new_params` does.

    Args:
        sigma: singular values [R], on the device of the parameters.
    """
    if parameters.shape != (layout.R,) or sigma.shape != (layout.R,):
        raise ValueError(
            f"parameters, sigma: expected shape [{layout.R}], got {list(parameters.shape)} and {list(sigma.shape)}"
        )
    if kind == "free":
        return parameters
    gate = torch.sigmoid(parameters)
    ranks = torch.tensor(layout.ranks, device=sigma.device)
    matrix = torch.repeat_interleave(torch.arange(len(ranks), device=sigma.device), ranks)
    sums = torch.zeros(2, len(ranks), device=sigma.device)
    before, after = sums.index_add(1, matrix, torch.stack([sigma, sigma * gate]))
    return gate * torch.where(after > 0, before / after, 1.0)[matrix]
