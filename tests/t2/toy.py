"""A model of two layers over a vocabulary of words, and a task it can learn in seconds: say the word that is asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from t2.tasks import Problem, Split, Task

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "say", "red", "green", "blue", "one", "two", "three", "four", "cat", "dog")
TARGETS = ("red", "green", "blue", "one")


class SayTheWord(Task):
    """Right is an answer that starts with the word; the likelihood of that grows with a suitable z."""

    name = "say"
    max_new_tokens = 3

    def __init__(self, solutions: bool = True) -> None:
        self.solutions = solutions

    def problems(self, split: Split) -> Sequence[Problem]:
        return [
            Problem(
                ({"role": "user", "content": " ".join(["say"] * (1 + i % 3) + [word])},),
                word,
                word if self.solutions else None,
            )
            for i, word in enumerate(TARGETS * 2)
        ]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [float(a.split()[:1] == [problem.reference]) for problem, a in zip(problems, answers, strict=True)]


def toy_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )


def toy_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.25)
    return model
