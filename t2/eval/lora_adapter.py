"""LoRA adapter of PEFT as a column of the tables."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from t2.generation.decode import DecodeOptions, complete
from t2.generation.prompts import eos_ids_of
from t2.weights.loading import load

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class _PeftRunner:
    """The interface that decoding needs of a model."""

    model: nn.Module

    @property
    def transformer(self) -> PreTrainedModel:
        return cast(PreTrainedModel, cast(Any, self.model).get_base_model())


class LoraAdapter:
    """Base model with a LoRA adapter, in float32, loaded at its first completion.

    Args:
        model: base model, as `t2.load` takes it.
        folder: PEFT's `save_pretrained` folder, such as `t2 train --method lora` writes.

    Raises:
        FileNotFoundError: a file of the folder is missing; weights load from safetensors only.
    """

    def __init__(self, model: str, folder: str | Path) -> None:
        self.name, self.folder = model, Path(folder).expanduser()
        for name in FILES:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"lora: expected a folder with {' and '.join(FILES)}, got {self.folder}")
        digests = (hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in FILES)
        self.identity = " ".join(digests)

    @cached_property
    def _loaded(self) -> tuple[_PeftRunner, tuple[int, ...], int]:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError("lora: needs the package peft: pip install 't2kernels[train]'") from error
        model, tokenizer = load(self.name)
        eos_ids = tuple(eos_ids_of(model, tokenizer))
        adapted = PeftModel.from_pretrained(model, str(self.folder), use_safetensors=True).eval()
        return _PeftRunner(adapted), eos_ids, int(tokenizer.pad_token_id)

    def answers(self, prompts: Sequence[Tensor], room: int) -> list[Tensor]:
        """Greedy completions of prompts, as token ids [length]."""
        runner, eos_ids, pad_token = self._loaded
        found = complete(runner, prompts, DecodeOptions(room, eos_ids, pad_token, torch.device("cpu")))
        return [completion.tokens for completion in found]
