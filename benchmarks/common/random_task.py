"""Tokenizer and task for training steps of models with random weights."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from t2.tasks import Problem, Split, Task
from t2.weights.step_sizes import StepSizes

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Tokenizer with one word for every id after the special tokens: w0, w1, ..."""
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=table, **named)


class Parity(Task):
    """Random prompts; a completion scores 1 if the checksum of its text is even, as about half of them do."""

    name = "parity"

    def __init__(self, work: StepSizes, words: int) -> None:
        self._work, self._words = work, words
        self.max_new_tokens = work.new_tokens

    def problems(self, split: Split) -> Sequence[Problem]:
        texts = [
            " ".join(f"w{(7 * i + 13 * seed) % self._words}" for i in range(self._work.prompt_tokens))
            for seed in range(self._work.prompts_per_step)
        ]
        return [Problem(({"role": "user", "content": text},)) for text in texts]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [float(zlib.crc32(answer.encode()) % 2 == 0) for answer in answers]
