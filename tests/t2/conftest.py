from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2.training.options import TrainOptions
from tests.t2.tiny_lm import CONFIGS


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        for parameter in model.parameters():  # away from the tiny initial range, so that experts change tokens
            if parameter.dim() == 2:
                parameter.data.normal_(std=0.3)
        return model.to(dtype)

    return make


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No factors or cost model of another test."""
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_options(tmp_path: Path) -> Callable[..., TrainOptions]:
    """A short run of the toy model."""

    def make(**changes: Any) -> TrainOptions:
        defaults: dict[str, Any] = {
            "task": "say",
            "output": tmp_path / "run",
            "steps": 6,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "validate_every": 2,
            "validation_size": 8,
            "test_size": 8,
            "learning_rate": 5e-2,
            "trackers": (),
        }
        return TrainOptions(**defaults | changes)

    return make


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "factors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder: a tiny Llama and a tokenizer of five words, without a pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    assert tokenizer.pad_token is None
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
