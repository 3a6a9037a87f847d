"""Wrapped models by name: loaded dense and decomposed, or streamed one matrix at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from t2.model.config import SVFConfig
from t2.model.svf_model import SVFModel
from t2.weights.loading import Tokenizer, load, padded_left
from t2.weights.streaming import Checkpoint, Stream, checkpoint_folder, streams


def load_svf(
    name_or_path: str | Path,
    config: SVFConfig | None = None,
    *,
    stream: Stream = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[SVFModel, Tokenizer]:
    """A model that is wrapped, and its tokenizer or processor: by `load_factored`, or by `t2.load` and `SVFModel`.

    Both give the same bits.
    `stream`: "auto" takes the first way for local folders with several shards, unless the model reads images.
    """
    if streams(name_or_path, stream):
        return load_factored(name_or_path, config, dtype=dtype, device=device)
    model, tokenizer = load(name_or_path, dtype=dtype, device=device)
    return SVFModel(model, config), tokenizer


def load_factored(
    name_or_path: str | Path,
    config: SVFConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[SVFModel, PreTrainedTokenizerBase]:
    """`SVFModel(t2.load(name_or_path)[0], config)` and the tokenizer, without the dense model in memory.

    Holds the factors as stored, the weights that are no targets, and what one matrix takes. An interrupted
    decomposition goes on where it stopped. Needs `config.cache`, and the files of the cache as long as the model is
    used: `merge` and `detach` read dense weights back from there.

    Args:
        name_or_path: a local folder, a Hub id (its files are downloaded), an alias or a GGUF file (converted once).
        config: how the model is decomposed.
        dtype: of the model: embeddings, norms, activations; targets are decomposed in it too, as `t2.load` does.

    Raises:
        TypeError: `dtype` is no floating-point dtype.
        ValueError: the checkpoint is quantised, or its tensors are not those of the model one by one.
        FileNotFoundError, FileFormatError: a file is missing, truncated, corrupt, or not in safetensors format.
    """
    config, checkpoint = config or SVFConfig(), Checkpoint(checkpoint_folder(name_or_path), dtype)
    if not config.cache:
        raise ValueError("cache: expected True where weights are read one by one, got False")
    weights = checkpoint.weights(config.target_modules)
    model = checkpoint.load_rest(weights, torch.device(device))
    model.name_or_path = model.config._name_or_path = str(name_or_path)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(checkpoint.folder))
    padded_left(tokenizer)
    return SVFModel(model, config, weights=weights), tokenizer
