"""`SVFLinear`: a drop-in for nn.Linear whose only parameter is z."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2kernels import checks
from t2kernels.decomposition import decompose
from t2kernels.weights import FactoredWeight


class SVFLinear(nn.Module):
    """y = U diag(s * z) Vh x + bias with frozen factors and a trainable z (arXiv 2501.06252, section 3.1).

    z is [r] for one expert or [E, r] for several; it starts at 1, which is the layer it came from. Training several
    experts at once costs what one costs: `layer(x, expert_ids=ids)` sends every leading row of x to its own row of z,
    and z.grad holds each expert's gradient in that expert's row.
    """

    def __init__(self, weight: FactoredWeight, bias: Tensor | None = None, num_experts: int | None = None) -> None:
        super().__init__()
        if num_experts is not None and num_experts < 1:
            raise ValueError(f"num_experts: expected None or an integer >= 1, got {num_experts}")
        self.weight = weight
        self.in_features = weight.in_features
        self.out_features = weight.out_features
        shape = (weight.rank,) if num_experts is None else (num_experts, weight.rank)
        self.z = nn.Parameter(torch.ones(shape, device=weight.s.device))
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, dtype: torch.dtype = torch.float32, num_experts: int | None = None
    ) -> SVFLinear:
        """Decomposes a linear layer (which is left as it is) and stores its factors as `dtype`."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected torch.nn.Linear, got {type(linear).__name__}")
        factors = decompose(linear.weight.detach())
        return cls(FactoredWeight.pack(*factors, dtype=dtype), linear.bias, num_experts)

    def forward(self, x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
        """x [B, ..., in] -> [B, ..., out]; expert_ids: int64 [B], needed when the layer holds several experts."""
        x = checks.check_activations(x, self.in_features)
        scales = self.weight.s * self.z.float()
        if self.z.dim() == 1:
            if expert_ids is not None:
                raise ValueError("expert_ids: expected None (this layer holds one expert), got a tensor")
            slots = torch.zeros(1, dtype=torch.int64, device=x.device)
            return self.weight.linear_unchecked(x, scales.unsqueeze(0), slots, self.bias)
        if expert_ids is None:
            raise ValueError(
                f"expert_ids: expected int64 [x.shape[0]] (this layer holds {self.z.shape[0]} experts), got None"
            )
        checks.check_ids("expert_ids", expert_ids, x, self.z.shape[0])
        return self.weight.linear_unchecked(x, scales, expert_ids, self.bias)

    def extra_repr(self) -> str:
        experts = "" if self.z.dim() == 1 else f", experts={self.z.shape[0]}"
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}{experts}"
