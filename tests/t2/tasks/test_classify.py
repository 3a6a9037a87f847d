from __future__ import annotations

import json
from collections import Counter

import pytest

from t2 import tasks
from t2.tasks import Problem
from t2.tasks.classify import Classification, Domain, adaptation_problem, question, said_label
from tests.t2.toy import SayTheWord

DOMAINS = {"sums": "adding numbers", "letters": "counting letters"}


class Counting(SayTheWord):
    def __init__(self, sizes: dict[str, int], word: str) -> None:
        super().__init__()
        self.sizes, self.word = sizes, word

    def problems(self, split):
        content = {"role": "user", "content": f"{self.word} {split}"}
        system = {"role": "system", "content": "be brief"}
        return [Problem((system, content | {"content": f"{content['content']} {i}"})) for i in range(self.sizes[split])]


@pytest.fixture
def task() -> Classification:
    sizes = [{"train": 6, "validation": 3, "test": 2}, {"train": 4, "validation": 5, "test": 2}]
    parts = {name: Counting(size, name) for name, size in zip(("sums", "letters"), sizes, strict=True)}
    parts["others"] = Counting({"train": 9, "validation": 9, "test": 9}, "hello")
    return Classification(parts, DOMAINS, validation_size=2)


def test_labels_come_equally_often_and_in_turns(task: Classification):
    for split, each in (("train", 4), ("validation", 2), ("test", 2)):
        problems = task.problems(split)
        labels = [problem.reference for problem in problems]
        assert Counter(labels) == {"sums": each, "letters": each, "others": each}
        assert labels[:3] == ["sums", "letters", "others"] and labels == [problem.solution for problem in problems]
        for problem in problems:
            word = "hello" if problem.reference == "others" else problem.reference
            assert problem.messages[-1]["content"].startswith(f"{word} {split} ")
            assert "be brief" not in str(problem.messages)
    assert task.problems("test") is task.problems("test")
    assert len({str(p.messages) for s in ("train", "validation", "test") for p in task.problems(s)}) == 24


def test_the_prompt_is_that_of_pass_one(task: Classification):
    domains = tuple(Domain(name, text) for name, text in DOMAINS.items())
    problem = task.problems("test")[0]
    asked = adaptation_problem("sums test 0", domains)
    assert problem.messages == asked.messages and asked.solution is None
    system = asked.messages[0]["content"]
    assert "- sums: adding numbers\n- letters: counting letters\n- others: anything else\n" in system


def test_what_the_user_said():
    talk = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "two"},
    ]
    assert question("one") == "one" and question(talk) == "one\n\ntwo" == question(Problem(tuple(talk)))


@pytest.mark.parametrize(
    "answer, label",
    [
        ("sums", "sums"),
        (" Sums.\nBecause", "sums"),
        ("**letters**", "letters"),
        ('"others"', "others"),
        ("The category is letters.", "letters"),
        ("sums, not letters", "sums"),
        ("It is sums or letters", None),
        ("summary", None),
        ("lettersums", None),
        ("", None),
        ("7", None),
    ],
)
def test_answers_are_read_leniently(task: Classification, answer: str, label: str | None):
    assert said_label(answer, task.labels) == label
    problems = task.problems("train")[:3]
    scores = task.scores(problems, [answer] * 3)
    assert scores == [float(label == problem.reference) for problem in problems]
    assert task.rewards(problems, [answer] * 3) == [2 * score - 1 for score in scores]


def test_a_label_within_another():
    assert said_label("word count", ("word", "word count")) == "word count"


def test_by_name_from_json(tmp_path):
    for name in ("a", "b"):
        rows = "".join(json.dumps({"prompt": f"{name} {i}", "answer": "x"}) + "\n" for i in range(30))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    options = json.loads(
        json.dumps(
            {
                "tasks": {
                    "sums": {"name": f"jsonl:{tmp_path / 'a.jsonl'}", "test_size": 4},
                    "letters": {"name": f"jsonl:{tmp_path / 'b.jsonl'}"},
                },
                "domains": DOMAINS,
                "max_new_tokens": 3,
            }
        )
    )
    task = tasks.get("classify", **options)
    assert task.name == "classify" and task.max_new_tokens == 3 and len(task.problems("test")) == 6
    with pytest.raises(ValueError, match=r"tasks: expected \{label: \{'name': \.\.\., options\}\}"):
        tasks.get("classify", tasks={"sums": "gsm8k"}, domains=DOMAINS)
    with pytest.raises(ValueError, match="task classify: missing a required argument"):
        tasks.get("classify")
    with pytest.raises(ValueError, match="test_sizes"):
        tasks.get("classify", tasks={"sums": {"name": "gsm8k", "test_sizes": 3}}, domains={"sums": ""})


def test_what_does_not_fit_is_refused():
    part = SayTheWord()
    for call, error, text in [
        (lambda: Classification({"sums": part}, DOMAINS), ValueError, "tasks: expected one for each of sums, letters"),
        (
            lambda: Classification({"x": part, "sums": part, "letters": part}, DOMAINS),
            ValueError,
            "tasks: expected one",
        ),
        (lambda: Classification({"sums": 3}, {"sums": ""}), TypeError, "tasks: expected a Task for sums, got int"),
        (lambda: Classification({"sums": part}, {"sums": ""}, train_size=0), ValueError, "train_size: expected an int"),
        (lambda: Classification({"sums": part}, {"sums": ""}).problems("dev"), ValueError, "split: classify has train"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_experts_are_told_the_domains(task: Classification):
    assert task.expert_metadata() == {"domains": '["sums", "letters"]'}
    assert SayTheWord().expert_metadata() == {}
