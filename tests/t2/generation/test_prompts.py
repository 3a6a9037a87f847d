"""Token ids of prompts with and without a chat template."""

from __future__ import annotations

import pytest
from tokenizers import processors

from t2.generation.prompts import encode_prompt, prompt_batch
from t2.tasks.base import Problem, prompt_text, user_message
from tests.t2.toy import toy_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROBLEMS = [Problem((user_message("say red"),)), Problem((user_message("one two three four"),))]
BOS = ("<s> $A", [("<s>", 1)])


def tokenizer(template=None, special=None):
    made = toy_tokenizer()
    if special is not None:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=special[0], special_tokens=special[1]
        )
    made.chat_template = template
    return made


@pytest.mark.parametrize("special", [None, BOS, ("$A </s>", [("</s>", 2)]), ("<s> $A </s>", [("<s>", 1), ("</s>", 2)])])
def test_without_a_template_ids_are_the_tokenizers_own(special):
    words = tokenizer(special=special)
    for problem in PROBLEMS:
        ids = encode_prompt(problem, words)[0].tolist()
        assert ids == words(prompt_text(problem, words))["input_ids"] and ids.count(1) == (special or "<")[0].count(
            "<s>"
        )
    batch = prompt_batch(PROBLEMS, words)
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [encode_prompt(problem, words)[0].tolist() for problem in PROBLEMS]


@pytest.mark.parametrize(("template", "begins"), [(f"<s> {TEMPLATE}", 1), (TEMPLATE, 0)])
def test_a_template_writes_its_special_tokens_itself(template, begins):
    for special in (None, BOS):
        ids = encode_prompt(PROBLEMS[0], tokenizer(template, special))[0].tolist()
        assert ids.count(1) == begins and ids[-2:] == [4, 5]
