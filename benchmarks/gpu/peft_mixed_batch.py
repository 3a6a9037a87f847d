"""Batches with a different LoRA adapter in each row through PEFT (`adapter_names`), against factored layers, eagerly.

PEFT splits the batch by adapter in Python, which a CUDA graph cannot capture, so both run eagerly: a decode step of a
model of Llama-3-8B's shapes with 8 of its 32 layers, 32 rows, 32 adapters of rank 16 on every linear layer.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu import end_to_end
from benchmarks.gpu.end_to_end import RANK, SMOKE, Decoder, Dense, Sizes, Store, Subject
from t2.weights.targets import linear_layers

LAYERS = 8


class PeftMixed(Subject):
    """The dense model under PEFT, with an adapter for each row of the largest batch."""

    def __init__(self, config: Any, device: torch.device, adapters: int) -> None:
        from peft import LoraConfig, get_peft_model

        dense = Dense(config, device)
        self._dense_bytes = dense.weight_bytes(1)
        names = list(linear_layers(dense.model))
        lora = LoraConfig(r=RANK, target_modules=names, init_lora_weights=False)
        with device:
            self._peft: Any = get_peft_model(dense.model, lora, adapter_name="0", autocast_adapter_dtype=False)
            for index in range(1, adapters):
                self._peft.add_adapter(str(index), lora, autocast_adapter_dtype=False)
        self._peft.requires_grad_(False).eval()
        own = [parameter for name, parameter in self._peft.named_parameters() if "lora_" in name]
        for parameter in own:
            parameter.data = parameter.data.to(device, torch.bfloat16)
        self._adapter_bytes = sum(2 * parameter.numel() for parameter in own)
        self._adapters = adapters
        self._names: list[str] = []
        self.model = _WithNames(self)

    @contextmanager
    def serving(self, rows: int, shift: int = 0) -> Any:
        self._names = [str((row + shift) % self._adapters) for row in range(rows)]
        yield

    def weight_bytes(self, rows: int) -> int:
        return self._dense_bytes + self._adapter_bytes * min(rows, self._adapters) // self._adapters


class _WithNames(torch.nn.Module):
    """The PEFT model, called with the adapter of each row."""

    def __init__(self, subject: PeftMixed) -> None:
        super().__init__()
        self.__dict__["_subject"] = subject

    def forward(self, **inputs: Any) -> Any:
        subject: PeftMixed = self.__dict__["_subject"]
        return subject._peft(**inputs, adapter_names=subject._names)


def measure(results: Store, device: torch.device, smoke: bool) -> None:
    """Stores "peft, <layers> layers | eager <rows> | <path>" for PEFT mixed, ours in bfloat16 and the dense model."""
    sizes, layers, rows = (SMOKE, 2, 3) if smoke else (Sizes(), LAYERS, 32)
    config = end_to_end.llama_config(smoke, layers)
    for title, path in {"dense bf16": "dense", "ours bf16": "bf16", "PEFT mixed": None}.items():
        start = time.perf_counter()
        subject: Subject = (
            PeftMixed(config, device, rows) if path is None else end_to_end.make_subject(path, config, device, sizes)
        )
        built = time.perf_counter() - start
        end_to_end.start_peak(device)
        found = results.once(
            f"peft, {layers} layers | eager {rows} | {title}",
            functools.partial(_eager, subject, config, device, rows, sizes),
        )
        step = found.get("seconds", float("nan"))
        print(f"{title}, {layers} layers, {rows} rows: {step * 1e3:.2f} ms (built in {built:.1f} s)", flush=True)
        del subject
        end_to_end.start_peak(device)


def _eager(subject: Subject, config: Any, device: torch.device, rows: int, sizes: Sizes) -> dict[str, Any]:
    with subject.serving(rows):
        decoder = Decoder(subject.model, config, device, rows, sizes)
        logits = decoder.step()
    return end_to_end.eager(subject, decoder, rows, sizes) | {
        "finite": bool(logits.isfinite().all()),
        "weight_bytes": subject.weight_bytes(rows),
        "peak_bytes": end_to_end.peak_bytes(device),
    }
