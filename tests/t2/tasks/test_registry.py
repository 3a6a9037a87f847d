from __future__ import annotations

import pytest

from t2 import tasks


def test_every_name_is_known():
    assert tasks.names() == [
        "arc-challenge",
        "arc-easy",
        "classify",
        "gsm8k",
        "humaneval",
        "math",
        "mbpp-pro",
        "mixture",
        "okvqa",
        "textvqa",
        "reasoning-gym:TASK",
        "jsonl:PATH",
    ]
    for name in set(tasks.names()[:10]) - {"classify", "mixture"}:
        task = tasks.get(name)
        assert task.name == name and task.max_new_tokens > 0


@pytest.mark.parametrize("name", ["gsm", "reasoning-gym", "jsonl:", "", "gsm8k:main"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"task: expected one of arc-challenge, .*, reasoning-gym:TASK, jsonl:PATH, got"
    ):
        tasks.get(name)


@pytest.mark.parametrize("name", ["gsm8k", "arc-easy", "reasoning-gym:chain_sum"])
def test_unknown_options_list_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"task {name}: .*'colour'; its options are .*max_new_tokens"):
        tasks.get(name, colour="red")


def test_names_are_strings():
    with pytest.raises(TypeError, match="task: expected a name, got int"):
        tasks.get(3)
