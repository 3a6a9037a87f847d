"""SVF experts in vLLM, through its own adapters: `--enable-lora`, and a bank's folder in `T2_BANK`.

    T2_BANK=bank vllm serve MODEL --enable-lora --max-loras 32 --max-lora-rank 1 --quantization t2_svf_delta

Installed beside vLLM the package is found by it (entry point `vllm.general_plugins`). docs/vllm.md has the rest.
"""

from __future__ import annotations

import os

SUPPORTED = ("0.32", "0.33")
"""Versions of vLLM whose private name `vllm.lora.utils._all_lora_classes` is known."""
RESOLVER = "t2"


def register() -> None:
    """Makes layers, quantisation methods and the bank known to vLLM; vLLM calls this in each of its processes.

    Nothing happens without a bank: vLLM is as it was.

    Raises:
        RuntimeError: a version of vLLM that this was not written for. FileNotFoundError: there is no bank.
    """
    from t2.integrations.vllm.bank import BANK, SUPPORT, set_support

    if not os.environ.get(BANK) and not os.environ.get(SUPPORT):
        return
    import vllm
    import vllm.lora.utils as lora_utils
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    version = ".".join(vllm.__version__.split("+")[0].split(".")[:2])
    if version not in SUPPORTED or not hasattr(lora_utils, "_all_lora_classes"):
        raise RuntimeError(f"vllm: expected version {' or '.join(SUPPORTED)}, got {vllm.__version__}")
    set_support()

    from t2.integrations.vllm.names import NAME
    from t2.integrations.vllm.quantization import register_methods

    if NAME not in QUANTIZATION_METHODS:
        register_methods()
    from t2.integrations.vllm.layers import SVF_LAYERS

    if SVF_LAYERS[0] not in lora_utils._all_lora_classes:
        lora_utils._all_lora_classes = (*SVF_LAYERS, *lora_utils._all_lora_classes)
    if os.environ.get(BANK) and RESOLVER not in LoRAResolverRegistry.get_supported_resolvers():
        from t2.integrations.vllm.resolver import BankResolver

        LoRAResolverRegistry.register_resolver(RESOLVER, BankResolver())
