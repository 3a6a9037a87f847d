"""The quantisation methods `t2_svf...` of vLLM: linear layers whose weights are in this package's storage.

    t2_svf            factors in the model's dtype          t2_svf_delta         W and the pair of the support, likewise
    t2_svf_int8       factors in 8 bits                     t2_svf_delta_int8    W and the pair in 8 bits
                                                            t2_svf_delta_int4    W in 4 bits, the pair in 8

W comes from a checkpoint with plain weights; the layers of `t2.integrations.vllm.layers` pack it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from t2.integrations.vllm.names import METHODS, NAME
from t2.integrations.vllm.plan import ModelPlan


class SVFQuantizationConfig(QuantizationConfig):
    """Base class of the methods' configurations; `CONFIGS` has one for each form and storage."""

    name = NAME
    delta = False
    storage: torch.dtype | None = None

    def get_name(self) -> Any:
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SVFQuantizationConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        packed = self.packed_modules_mapping.get(prefix.rpartition(".")[2], [])
        if ModelPlan.current().matrices(prefix, packed) is None:
            return UnquantizedLinearMethod()
        if get_current_vllm_config().lora_config is None:
            raise ValueError(f"enable_lora: expected it beside the quantisation method {self.name}, got none")
        _compile_again()
        return SVFLinearMethod(self.delta, self.storage or layer.params_dtype)


def _compile_again() -> None:
    """Lets vLLM compile the model although it has adapters, which its CPU build leaves out: these layers trace."""
    config = get_current_vllm_config()
    options = config.compilation_config
    if current_platform.is_cpu() and options.mode == CompilationMode.NONE and not config.model_config.enforce_eager:
        options.mode = CompilationMode.DYNAMO_TRACE_ONCE


class SVFLinearMethod(UnquantizedLinearMethod):
    """Leaves the weight as it was loaded until the layer that serves experts takes it over."""

    supports_pre_processed_weights = False

    def __init__(self, delta: bool, storage: torch.dtype) -> None:
        super().__init__()
        self.delta, self.storage = delta, storage

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise RuntimeError(
            f"{getattr(layer, 'prefix', layer)}: expected a layer that vLLM gives adapters; target_modules of its LoRA "
            "options leave this one out"
        )

    def release(self, layer: Any) -> None:
        """Frees the weight, which is packed by now."""
        empty = torch.empty(0, dtype=layer.weight.dtype, device=layer.weight.device)
        layer.weight = nn.Parameter(empty, requires_grad=False)


def _config(name: str, delta: bool, storage: torch.dtype | None) -> type[SVFQuantizationConfig]:
    members = {"name": name, "delta": delta, "storage": storage, "__module__": __name__}
    return type(f"SVFQuantizationConfig_{name}", (SVFQuantizationConfig,), members)


CONFIGS = {name: _config(name, *about) for name, about in METHODS.items()}
globals().update({kind.__name__: kind for kind in CONFIGS.values()})  # where pickle looks for them


def register_methods() -> None:
    """Makes the methods known to vLLM."""
    for name, kind in CONFIGS.items():
        register_quantization_config(name)(kind)
