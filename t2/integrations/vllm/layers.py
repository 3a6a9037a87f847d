"""Linear layers of vLLM that give each token its expert: in the place of those that give it its LoRA adapter.

A slot of vLLM's adapter manager is one row of scales for each matrix; row 0 is the base. vLLM keeps the slot of every
token in a tensor that stays where it is, so that one call serves a batch with any experts in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from t2.integrations.vllm.bank import ROWS, base_bits
from t2.integrations.vllm.plan import Matrix, ModelPlan
from t2.integrations.vllm.quantization import SVFLinearMethod
from t2kernels import DeltaWeight, FactoredWeight
from t2kernels.backends import extension
from t2kernels.weights import FactoredGroup, KeptGroup

SLOTS = "t2_slots"
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class SVFLayer:
    """Mixin that lets a class of vLLM's LoRA layers serve experts instead.

    W is in our own storage where vLLM was told the quantisation method `t2_svf`, and otherwise stays with vLLM's
    kernels, whose output gets the correction of the delta form.
    """

    base_layer: Any
    punica_wrapper: Any
    tp_size: int
    tp_rank: int

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        self.lora_config, self.max_loras = lora_config, max_loras
        self._enable_aux_cuda_stream = False
        self.plan = ModelPlan.current()
        matrices: list[Matrix] = self.base_layer.t2_matrices
        self.names = [matrix.name for matrix in matrices]
        weights = [matrix.read() for matrix in matrices]
        self._check_weights(weights)
        device = _device_of(self.base_layer)
        method = self.base_layer.quant_method
        self.own = isinstance(method, SVFLinearMethod)
        self.delta = not self.own or method.delta
        dtype = method.storage if self.own else self.base_layer.params_dtype
        self.components = [self.plan.components(name) if self.delta else None for name in self.names]
        parts = []
        for w, vh, s, u in self._shards(weights):
            parts.append(_packed(w, u, s, vh, dtype, device, own=self.own, delta=self.delta))
        self.sizes = [part.out_features for part in parts]
        self._packed, self.parts = parts, nn.ModuleList(parts)
        self.plan.tensors += self.parts.buffers()
        self.group = FactoredGroup(parts)
        # a row per slot of s z, or s (z - 1) in the delta form; row 0 is the base
        firsts = [torch.zeros_like(part.s) if self.delta else part.s for part in parts]
        self.tables = [first.repeat(max_loras + 1, 1) for first in firsts]
        self.plan.tables += self.tables
        self.kept = None
        if extension is not None and device.type == "cpu":
            bias = self._own_bias() if self.own else None
            biases = [None] * len(parts) if bias is None else list(bias.detach().split(self.sizes))
            self.kept = KeptGroup(parts, self.tables, biases)
        # shapes that vLLM's manager makes its adapters for the warm-up from
        ranks = [min(w.shape) for w in weights]
        self.lora_a_stacked = tuple(torch.zeros(1, 1, 1, rank) for rank in ranks)
        self.lora_b_stacked = tuple(torch.zeros(1, 1, 1, 1) for _ in ranks)
        if self.own:
            method.release(self.base_layer)

    def _shards(self, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """W, Vh, s and U of each matrix, the part of this process: rows of W and U, or columns of W and Vh."""
        found = []
        for name, components in zip(self.names, self.components, strict=True):
            u, s, vh = self.plan.factors(name)
            if components is not None:
                u, s, vh = u[:, components], s[components], vh[components]
            found.append((u, s, vh))
        us = self._rows([u for u, _, _ in found])
        vhs = [self._columns(vh) for _, _, vh in found]
        return list(zip(self._own_part(weights), vhs, [s for _, s, _ in found], us, strict=True))

    def _own_part(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [self._columns(w) for w in self._rows(weights)]

    def _rows(self, given: Sequence[Tensor]) -> list[Tensor]:
        """This process's rows of matrices [out, n], as vLLM divides LoRA's B."""
        if self.tp_size == 1:
            return list(given)
        own: Any = self
        if len(given) > 1:
            return list(own.slice_lora_b(list(given)))
        return [own.slice_lora_b(given[0])]

    def _columns(self, given: Tensor) -> Tensor:
        """This process's columns of a matrix [n, in], as vLLM divides LoRA's A."""
        if self.tp_size == 1 or not isinstance(self, RowParallelLinearWithLoRA):
            return given
        return self.slice_lora_a(given)

    def _check_weights(self, weights: Sequence[Tensor]) -> None:
        """ValueError where the layer computes something else than the checkpoint's matrices."""
        layer = self.base_layer
        expected = torch.cat(self._own_part(weights))
        held = getattr(layer, "weight", None)
        if isinstance(held, Tensor) and held.shape == expected.shape and held.dtype in PLAIN:
            same = bool((held.detach().cpu() == expected.to(held.dtype)).all())
        else:
            x = torch.randn(8, expected.shape[1], generator=torch.Generator().manual_seed(0))
            device = _device_of(layer)
            y = layer.quant_method.apply(layer, x.to(device, layer.params_dtype)).float().cpu()
            wanted = x @ expected.T
            most = 0.02 if isinstance(layer.quant_method, UnquantizedLinearMethod) else 0.3  # 4 bits: about a tenth
            same = float((y - wanted).norm() / wanted.norm()) < most
        if not same:
            raise ValueError(
                f"{layer.prefix}: expected the weights of {', '.join(self.names)} in {self.plan.folder}, "
                "got others; vLLM changes this model's weights while it loads them"
            )

    def reset_lora(self, index: int) -> None:
        for table in self.tables:
            table[index + 1] = table[0]

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        try:
            self._set(index, lora_a, lora_b)
        except Exception:
            for table in self.plan.tables:  # vLLM takes the slot for a good one now: no answer is better than a mixture
                table[index + 1] = torch.nan
            raise

    def _set(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.plan.check_served()
        given = lora_a if isinstance(lora_a, list) else [lora_a]
        for b in lora_b if isinstance(lora_b, list) else [lora_b]:
            if b is not None and b.shape[0] != 1:
                raise ValueError(f"{self.names[0]}: expected an expert of the bank, got a LoRA adapter")
        for name, table, part, kept, rows in zip(
            self.names, self.tables, self._packed, self.components, given, strict=True
        ):
            if rows is None or not bool(rows.any()):  # vLLM warms up with zeros
                table[index + 1] = table[0]
            else:
                table[index + 1] = _scales(name, self._offset(name, rows), part.s, kept)

    def _offset(self, name: str, rows: Tensor) -> Tensor:
        """z - 1 [r] from the rows of an adapter. Raises ValueError where these are another base's, or no expert's."""
        rows = rows.float()
        if len(rows) != ROWS + 1:
            raise ValueError(f"{name}: expected an expert of the bank, got a LoRA adapter")
        if not torch.equal(rows[ROWS].cpu(), base_bits(self.plan.fingerprint, rows.shape[1])):
            raise ValueError(f"{name}: expected an expert of the weights in {self.plan.folder}, got one of others")
        return rows[:ROWS].sum(0)

    def _slots(self, rows: int, on_cpu: bool) -> Tensor:
        """The row of the tables for each token."""
        indices = self.punica_wrapper._token_lora_indices[:rows]
        if torch.compiler.is_compiling() or not on_cpu or not is_forward_context_available():
            return (indices + 1).clamp_(0, self.max_loras)
        shared = get_forward_context().additional_kwargs
        key = (SLOTS, id(self.punica_wrapper), rows)
        slots: Tensor | None = shared.get(key)
        if slots is None:
            slots = shared[key] = (indices + 1).clamp_(0, self.max_loras)
        return slots

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.own:
            own: Any = super()
            y: Tensor = own.apply(x, bias)
            return y
        return self._products(x, bias)

    def _own_bias(self) -> Tensor | None:
        """The bias that vLLM's layers give `apply`."""
        layer = self.base_layer
        if layer.skip_bias_add or (isinstance(self, RowParallelLinearWithLoRA) and self.tp_rank > 0):
            return None
        bias: Tensor | None = layer.bias
        return bias

    def _products(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The products of all matrices side by side."""
        flat = x.reshape(-1, x.shape[-1])
        slots = self._slots(len(flat), x.is_cpu)
        if self.kept is not None:
            y = self.kept.linear_unchecked(flat, slots)
        else:
            biases = [None] * len(self.sizes) if bias is None else list(bias.split(self.sizes))
            out = self.group.linear_unchecked(flat, self.tables, slots, biases)
            y = out[0] if len(out) == 1 else torch.cat(out, -1)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self._products(x, None)

    @classmethod
    def can_replace_layer(
        cls, source_layer: Any, lora_config: Any, packed_modules_list: Any, model_config: Any = None, **options: Any
    ) -> bool:
        parent: Any = super()
        fits = parent.can_replace_layer(
            source_layer=source_layer,
            lora_config=lora_config,
            packed_modules_list=packed_modules_list,
            model_config=model_config,
            **options,
        )
        if not fits:
            return False
        matrices = ModelPlan.current().matrices(source_layer.prefix, packed_modules_list)
        if matrices is None:
            return False
        source_layer.t2_matrices = matrices
        return True


def _packed(
    w: Tensor, u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype, device: torch.device, *, own: bool, delta: bool
) -> FactoredWeight | DeltaWeight:
    w, u, s, vh = (each.contiguous().to(device) for each in (w, u, s, vh))
    short = dtype == torch.bfloat16
    if own and delta:
        return DeltaWeight.pack(w, u, s, vh, dtype=dtype, bf16_products=short)
    return FactoredWeight.pack(u, s, vh, dtype=dtype, bf16_products=short, float16_head=not delta)


def _scales(name: str, offset: Tensor, s: Tensor, components: Tensor | None) -> Tensor:
    """A row of the table from z - 1 [r]. Raises ValueError for an expert that changes components beside the support."""
    if components is not None:
        beside = torch.ones(len(offset), dtype=torch.bool)
        beside[components] = False
        if bool(offset[beside].any()):
            raise ValueError(
                f"{name}: expected an expert on the support of the delta form, got one that changes "
                f"{int(offset[beside].count_nonzero())} components beside it; restart with it in the bank, or name a "
                "support in T2_SUPPORT"
            )
        offset = offset[components]
    offset = offset.to(s.device)
    return s * offset if components is not None else s * (1 + offset)


def _device_of(layer: nn.Module) -> torch.device:
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        return tensor.device
    return torch.device("cpu")


SVF_LAYERS: tuple[type, ...] = tuple(
    type(f"SVF{kind.__name__}", (SVFLayer, kind), {})
    for kind in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
    )
)
