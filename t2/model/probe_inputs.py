"""Inputs that a model is likely to take: three ragged rows, made from its config or its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    pass


ROWS = 3
LENGTHS = (8, 5, 7)


Inputs = Mapping[str, Any]


def input_candidates(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments of a forward pass of three ragged rows, likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(model, PreTrainedModel):
        yield from _transformers_inputs(model, set(parameters), device)
        return
    first = next((name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD), None)
    if first is None:
        return
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if embedding is not None:
        ids = _ids(embedding.num_embeddings, set(), device)
        yield {first: ids}
        if "labels" in parameters:
            yield {first: ids, "labels": ids}
    if linear is not None:
        dtype = linear.weight.dtype
        yield {first: _normal(ROWS, max(LENGTHS), linear.in_features).to(device, dtype)}
        yield {first: _normal(ROWS, linear.in_features).to(device, dtype)}


def _transformers_inputs(model: PreTrainedModel, names: set[str], device: torch.device) -> Iterator[Inputs]:
    config, dtype = model.config, model.dtype
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    special = {value for c in (config, text) for name, value in vars(c).items() if _is_token(name, value)}
    vocabulary = getattr(text, "vocab_size", None)
    mask = _mask(device)
    more: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names and vocabulary:
        more["decoder_input_ids"] = _ids(vocabulary, special, device)[:, :5]
    main = model.main_input_name
    if "input_ids" in names and vocabulary:
        ids, bos = _ids(vocabulary, special, device), getattr(text, "bos_token_id", None)
        if isinstance(bos, int) and 0 <= bos < vocabulary:  # rows begin as prompts do
            ids = torch.where(mask & (mask.cumsum(1) == 1), bos, ids)
        if "attention_mask" in names:
            pad = getattr(text, "pad_token_id", None)
            pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
            yield {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long(), **more}
        yield {"input_ids": ids, **more}
    if main == "pixel_values" or (main not in ("input_ids",) and "pixel_values" in names):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        yield {
            "pixel_values": _normal(ROWS, getattr(vision, "num_channels", 3), height, width).to(device, dtype),
            **more,
        }
    if "input_features" in names:
        bins = next((n for n in (getattr(config, a, None) for a in ("num_mel_bins", "feature_size")) if n), 80)
        frames = 2 * getattr(config, "max_source_positions", 50)
        yield {"input_features": _normal(ROWS, bins, frames).to(device, dtype), **more}
        yield {"input_features": _normal(ROWS, 64, bins).to(device, dtype), **more}
    if "input_values" in names:
        yield {"input_values": _normal(ROWS, 4000).to(device, dtype), **more}
    hidden = getattr(text, "hidden_size", None)
    if "inputs_embeds" in names and hidden:
        yield {"inputs_embeds": _normal(ROWS, max(LENGTHS), hidden).to(device, dtype), **more}


def _is_token(name: str, value: object) -> bool:
    return isinstance(value, int) and name.endswith(("_token_id", "_token_index", "_token"))


def _ids(vocabulary: int, special: set[int], device: torch.device) -> Tensor:
    allowed = [i for i in range(min(vocabulary, 2000)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(allowed), (ROWS, max(LENGTHS)), generator=generator)
    return torch.tensor(allowed)[chosen].to(device)


def _mask(device: torch.device) -> Tensor:
    """Rows of LENGTHS tokens, padded on the left."""
    longest = max(LENGTHS)
    return torch.stack([torch.arange(longest) >= longest - length for length in LENGTHS]).to(device)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
