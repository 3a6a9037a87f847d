"""Baselines that serve many experts: factored in plain torch, W' rebuilt per expert, PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from t2.experts.layout import Layout
from t2.weights.targets import Linear, weight_matrix
from t2kernels import Factors


class TorchFactoredLinear(nn.Module):
    """((x Vh^T) * scale[row]) U^T in torch operators; row b uses `scales[b]`, which is set per batch."""

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.factors = factors
        self.bias = bias
        self.scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        u, _, vh = self.factors
        y = ((x @ vh.T) * self.scales[: x.shape[0]].view(x.shape[0], *[1] * (x.dim() - 2), -1)) @ u.T
        return y if self.bias is None else y + self.bias


def use_torch_factored(model: nn.Module, factors: Mapping[str, Factors], layout: Layout, z: Tensor) -> None:
    """Replace the layers named in `factors`; row b of every batch runs with z[b] (z: [B, R])."""
    for name, factor in factors.items():
        layer = TorchFactoredLinear(factor, cast(Linear, model.get_submodule(name)).bias)
        layer.scales = factor.s * z[:, layout.window(name)]
        model.set_submodule(name, layer)


@torch.no_grad()
def rebuild(model: nn.Module, factors: Mapping[str, Factors], layout: Layout, z: Tensor) -> None:
    """Overwrite every target weight with W' = U diag(s z) Vh: one matmul each, where the published code does two."""
    for name, (u, s, vh) in factors.items():
        torch.matmul(u * (s * z[layout.window(name)]), vh, out=weight_matrix(cast(Linear, model.get_submodule(name))))


def with_lora(model: nn.Module, target_modules: Sequence[str], adapters: int, rank: int = 16) -> tuple[Any, list[str]]:
    """PEFT model with `adapters` LoRA adapters on the named modules, and their names for `adapter_names`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=list(target_modules), init_lora_weights=False, task_type="CAUSAL_LM")
    names = [f"adapter{i}" for i in range(adapters)]
    peft_model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    return peft_model.eval(), names
