"""Batches with a different LoRA adapter in each row through PEFT (`adapter_names`), against factored layers, eagerly.

    python benchmarks/gpu/peft_mixed.py --out DIR [--smoke] [--layers 8]

PEFT splits the batch by adapter in Python, which a CUDA graph cannot capture, so both run eagerly: a decode step of a
model of Llama-3-8B's shapes with 8 of its 32 layers, 32 rows, 32 adapters of rank 16 on every linear layer.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

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


def measure_peft(
    results: Store, device: torch.device, smoke: bool, *, layers: int = LAYERS, rows: Sequence[int] | None = None
) -> None:
    """Stores "peft, <layers> layers | eager <rows> | <path>" for PEFT mixed, ours in bfloat16 and the dense model."""
    sizes = SMOKE if smoke else Sizes()
    layers = 2 if smoke else layers
    config = end_to_end.llama_config(smoke, layers)
    rows = rows or ((3,) if smoke else (32,))
    for title in ("dense bf16", "ours bf16", "PEFT mixed"):
        start = time.perf_counter()
        subject: Subject
        if title == "PEFT mixed":
            subject = PeftMixed(config, device, max(rows))
        else:
            subject = end_to_end.make_subject(
                {v: k for k, v in end_to_end.TITLES.items()}[title], config, device, sizes
            )
        built = time.perf_counter() - start
        for count in rows:
            end_to_end.start_peak(device)
            found = results.once(
                f"peft, {layers} layers | eager {count} | {title}",
                functools.partial(_eager, subject, config, device, count, sizes),
            )
            seconds = found.get("seconds", float("nan"))
            print(
                f"{title}, {layers} layers, {count} rows: {seconds * 1e3:.2f} ms (built in {built:.1f} s)", flush=True
            )
        del subject
        end_to_end.start_peak(device)


measure = measure_peft


def _eager(subject: Subject, config: Any, device: torch.device, rows: int, sizes: Sizes) -> dict[str, Any]:
    with subject.serving(rows):
        decoder = Decoder(subject.model, config, device, rows, sizes)
        logits = decoder.step()
    return end_to_end.eager(subject, decoder, rows, sizes) | {
        "finite": bool(logits.isfinite().all()),
        "weight_bytes": subject.weight_bytes(rows),
        "peak_bytes": end_to_end.peak_bytes(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of peft-mixed.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the model, default %(default)s")
    arguments = parser.parse_args()
    results = end_to_end.FileResults(arguments.out / "peft-mixed.json")
    measure_peft(results, end_to_end.pick_device(arguments.smoke), arguments.smoke, layers=arguments.layers)


if __name__ == "__main__":
    main()
