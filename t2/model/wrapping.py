"""Wrapping with a probe before and after: layers that cannot be decomposed stay dense, wrong models are refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from t2.model.decomposed import DecomposedLayers
from t2.model.probe import Probe
from t2.model.verify import ROUNDING, VerificationError, check
from t2.weights.quantized import activation_dtype, is_quantized
from t2.weights.targets import Linear, Unsuitable


class VerifiedWrapping:
    """Wraps a model's targets, and verifies it: at once where inputs can be made, else at its first mixed batch.

    `left_out` is shared with the model: layers that stay dense, and why.
    """

    def __init__(self, decomposed: DecomposedLayers, targets: Mapping[str, nn.Module], left_out: Unsuitable) -> None:
        config = decomposed.config
        own = activation_dtype(decomposed.model)
        dtypes = {
            layer.weight.dtype if isinstance(layer, Linear) and not is_quantized(layer) else own
            for layer in targets.values()
        }
        self.rounding = max(ROUNDING[config.dtype or dtype] + ROUNDING[dtype] for dtype in dtypes)
        if config.bf16_products:
            self.rounding += ROUNDING[torch.bfloat16]
        self.verified = not config.verify
        self.left_out = left_out
        self._decomposed = decomposed

    def wrap(self, targets: Mapping[str, nn.Module], example_inputs: Mapping[str, Any] | None) -> None:
        """Decomposes the targets that pass the probe; the model is as it was if there are none.

        Raises:
            VerificationError: the wrapped model would answer otherwise.
        """
        decomposed, probe = self._decomposed, None
        model, config = decomposed.model, decomposed.config
        streamed = decomposed.readers is not None
        if config.verify and not streamed:
            probe = Probe.of(model, example_inputs)
            if probe is None:
                warnings.warn(
                    f"{type(model).__name__} was wrapped without verification: no inputs could be made for it. "
                    "example_inputs gives some; else its first call with several experts is verified",
                    stacklevel=4,
                )
            else:
                targets = self._leave_out(targets, probe.look(model, targets, self.rounding))
        while True:
            decomposed.insert(targets)
            if config.verify and streamed:
                probe = Probe.of(model, example_inputs)
                rows = {} if probe is None else probe.look_rows(model, decomposed.routed)
                if rows:
                    raise VerificationError(f"model: expected requests in the rows of every layer. {rows}")
            if probe is None:
                return
            trouble = check(decomposed, probe, self.rounding, base=not streamed and decomposed.factors is None)
            if trouble is None:
                self.verified = True
                return
            if streamed or config.shard is not None:
                raise VerificationError(f"{type(model).__name__} can't be wrapped: {trouble.cause}")
            decomposed.remove()
            if not trouble.names:
                raise VerificationError(
                    f"{type(model).__name__} can't be wrapped: {trouble.cause}. It is as it was; "
                    "target_modules can name fewer layers, and verify=False wraps it all the same"
                )
            targets = self._leave_out(targets, Unsuitable(dict.fromkeys(trouble.names, trouble.cause)))

    def _leave_out(self, targets: Mapping[str, nn.Module], reasons: Unsuitable) -> dict[str, nn.Module]:
        self.left_out.update(reasons)
        left = {name: layer for name, layer in targets.items() if name not in reasons}
        if not left:
            kind = type(self._decomposed.model).__name__
            raise VerificationError(f"{kind} can't be wrapped: no layer is left to decompose. {self.left_out}")
        return left

    def verify_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Verifies with the inputs of a call, for a model that no inputs could be made for."""
        model, decomposed = self._decomposed.model, self._decomposed
        probe = Probe.of_call(model, args, kwargs)
        if probe is None:
            return
        self.verified = True  # calls of the probe are calls too
        faults = str(probe.look_rows(model, decomposed.routed))
        if not faults and (trouble := check(decomposed, probe, self.rounding, base=False)) is not None:
            faults = trouble.cause
        if faults:
            self.verified = False
            raise VerificationError(f"experts: expected requests in the rows of every layer. {faults}")
