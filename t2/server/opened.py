"""A model with its engine, as the commands that answer requests open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from t2.adaptation.bank_folder import bank_path
from t2.generation.engine import Engine
from t2.generation.prompts import eos_ids_of
from t2.generation.whole_batches import WholeBatchEngine
from t2.model.load import load_svf
from t2.model.svf_model import SVFConfig, SVFModel
from t2.weights.loading import tokenizer_of


@dataclass(frozen=True)
class Opened:
    svf: SVFModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    model: str
    """The name that the base goes by."""
    folder: Path | None
    """Of the experts."""


def open_engine(
    model: str,
    bank: Path | None,
    *,
    dtype: torch.dtype,
    form: str = "factored",
    support: Path | None = None,
    news: Callable[[str], object],
    **limits: Any,
) -> Opened:
    """Loads a model and makes its engine.

    Args:
        bank: folder of experts, or the name of one that ships; its experts are not read yet.
        support: of the delta form; default the bank's.
        news: is given a line where the model needs whole batches (`t2.generation.whole_batches`).
        limits: of `Engine`.

    Raises:
        FileNotFoundError: no folder of this name. ValueError, TypeError: as `t2.load`, `SVFModel` and `Engine` do.
    """
    folder = None if bank is None else bank_path(bank)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"bank: expected a folder, got {folder}")
    chosen = folder if form == "delta" and support is None else support
    options: Any = {"form": form, "support": chosen}
    svf, processor = load_svf(model, SVFConfig(dtype=dtype, bf16_products=dtype == torch.bfloat16, **options))
    tokenizer = tokenizer_of(processor)
    limits["eos_ids"] = eos_ids_of(svf.model, tokenizer)
    try:
        engine = Engine(svf, **limits)
    except TypeError as error:
        engine = WholeBatchEngine(svf, **limits)
        news(f"requests run in whole batches, each to its end: {error}")
    return Opened(svf, tokenizer, engine, Path(model).name, folder)
