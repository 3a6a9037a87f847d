"""Prompts as a model reads them: token ids, image inputs, and the EOS ids that end a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
)

from t2.generation.images import ImageInputs, collate
from t2.tasks.base import Problem, prompt_text
from t2.tasks.images import open_image
from t2.weights.loading import Tokenizer, tokenizer_of


def encode_prompt(problem: Problem, tokenizer: Tokenizer) -> tuple[Tensor, ImageInputs]:
    """The prompt's token ids [length], placeholders of its images among them, and its image inputs.

    A chat template writes the special tokens it wants. Without one the ids are those of `tokenizer(text)`, with the
    tokenizer's own special tokens: base models answer badly without their beginning-of-sequence token.

    Raises:
        ValueError: the problem has images, but there is no processor to read them; or not one for each placeholder.
        FileNotFoundError, FileFormatError: an image cannot be read.
    """
    words = tokenizer_of(tokenizer)
    if words is tokenizer and problem.images:
        raise ValueError(
            f"tokenizer: expected the processor of a model that reads images, got {type(tokenizer).__name__}"
        )
    text, plain = prompt_text(problem, tokenizer), tokenizer.chat_template is None
    if words is tokenizer:
        return words(text, return_tensors="pt", add_special_tokens=plain)["input_ids"][0], {}
    processor: Any = tokenizer
    batch = processor(
        text=[text],
        images=[open_image(image) for image in problem.images] or None,
        return_tensors="pt",
        add_special_tokens=plain or words.bos_token is None or not text.startswith(words.bos_token),
    )
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    return batch["input_ids"][0], inputs if problem.images else {}


def prompt_batch(problems: Sequence[Problem], tokenizer: Tokenizer) -> dict[str, Any]:
    """The prompts of several problems as one batch for `generate`, padded as the tokenizer pads."""
    encoded = [encode_prompt(problem, tokenizer) for problem in problems]
    padded = tokenizer_of(tokenizer).pad({"input_ids": [ids.tolist() for ids, _ in encoded]}, return_tensors="pt")
    return dict(padded) | collate([inputs for _, inputs in encoded], padded["input_ids"].shape[1])


def encode(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The prompt's token ids [length]."""
    return encode_prompt(problem, tokenizer)[0]


def eos_ids_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The EOS ids that end a completion: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None})
