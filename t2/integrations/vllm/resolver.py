"""Experts and mixes of a bank by the `model` of a request."""

from __future__ import annotations

import asyncio
import logging

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from t2.integrations.vllm.bank import Bank, lora_request

log = logging.getLogger("vllm.t2")


class BankResolver(LoRAResolver):
    """Finds experts and mixes ("sums:0.7+logic:0.3") in the folder of `T2_BANK`, as its files are now."""

    def __init__(self) -> None:
        self.bank = Bank.from_environment()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        try:
            return await asyncio.to_thread(lora_request, lora_name, self.bank)
        except KeyError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.error("expert %r refused: %s", lora_name, error)
            return None
