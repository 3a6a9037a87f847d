"""Prompts with images as a model reads them: token ids, and whatever else its processor makes of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_ends
from transformers import PreTrainedModel

ImageInputs = Mapping[str, Tensor]
"""Image inputs of one prompt beside its token ids, by name: pixel_values and the like; empty without images."""


def collate(inputs: Sequence[ImageInputs], width: int, after: int = 0, device: Any = "cpu") -> dict[str, Tensor]:
    """The image inputs of several prompts as those of one batch; empty if none has any.

    Values for each token (`*token_type_ids` [1, length]) are padded on the left to `width` tokens, and `after`
    zeros follow. All else lies one prompt behind the other along the first dimension, with zeros at the ends of the
    other dimensions where sizes differ, as processors pad a batch.
    """
    batch = {}
    for name in dict.fromkeys(name for each in inputs for name in each):
        if name.endswith("token_type_ids"):
            rows = [each.get(name, torch.zeros(1, 0, dtype=torch.int64)) for each in inputs]
            joined = torch.cat([pad_ends(row, (width - row.shape[1], after)) for row in rows])
        else:
            parts = [each[name] for each in inputs if name in each]
            sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
            joined = torch.cat([_grown(part, sizes) for part in parts])
        batch[name] = joined.to(device)
    return batch


def _grown(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """With zeros at the end of each dimension but the first, up to these sizes."""
    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    return pad_ends(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor


def positions(mask: Tensor) -> Tensor:
    """Positions [rows, length] of tokens, counted without padding."""
    return (mask.cumsum(-1) - 1).clamp_(min=0)


def positions_of(model: PreTrainedModel, ids: Tensor, mask: Tensor, images: ImageInputs) -> tuple[Tensor, Tensor]:
    """Positions of a batch's tokens, and how much further the text behind it is than its count of tokens, [rows, 1].

    Positions are [rows, length], or [3, rows, length] in models that place an image's tokens on a grid (M-RoPE, as
    Qwen2.5-VL does), whose `get_rope_index` tells.
    """
    grid = getattr(model.base_model, "get_rope_index", None)
    if not images or grid is None:
        return positions(mask), mask.new_zeros(len(mask), 1)
    found: Tensor = grid(ids, attention_mask=mask, **images)[0]
    return found, found.amax(dim=(0, -1)).unsqueeze(-1) + 1 - mask.sum(-1, keepdim=True)


def placeholder_tokens(model: Any) -> list[int]:
    """The tokens that stand for images and videos, which no answer may hold: there is nothing behind them."""
    found = (getattr(model.config, f"{name}_token_id", None) for name in ("image", "video"))
    return [int(token) for token in found if token is not None]
