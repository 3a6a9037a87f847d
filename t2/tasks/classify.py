"""The adaptation prompt (arXiv 2501.06252, section 3.2), and the task that trains a classification expert for it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from t2.tasks.base import Problem, Split, Task
from t2.tasks.dataset_task import check_size, check_split

BASE = "base"
OTHERS = "others"
"""Label of prompts outside all domains, which the base completes."""
RESERVED = (BASE, OTHERS)
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Prompt = Problem | str | Sequence[Mapping[str, str]]
"""A request: a problem, its text, or a conversation of {"role": ..., "content": ...}."""


@dataclass(frozen=True)
class Domain:
    """Domain of an expert.

    name: the expert's name, and its label in the adaptation prompt. description: one line on the domain's questions.
    """

    name: str
    description: str = ""

    def __post_init__(self) -> None:
        for field, value in (("name", self.name), ("description", self.description)):
            if not isinstance(value, str) or "\n" in value or value != value.strip():
                raise ValueError(f"{field}: expected one line of text, got {value!r}")
        if not self.name or self.name in RESERVED:
            raise ValueError(f"name: expected a name other than {' and '.join(RESERVED)}, got {self.name!r}")


Domains = Sequence[Domain] | Mapping[str, str]
"""Domains, or their descriptions by name."""


def as_domains(domains: Domains) -> tuple[Domain, ...]:
    """Domains as a tuple; ValueError unless there is at least one and their names differ."""
    if isinstance(domains, Mapping):
        domains = [Domain(name, description) for name, description in domains.items()]
    if isinstance(domains, str) or not all(isinstance(domain, Domain) for domain in domains):
        raise TypeError(f"domains: expected a list of Domain, or descriptions by name, got {domains!r:.80}")
    names = [domain.name for domain in domains]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"domains: expected at least one, each with a name of its own, got {names}")
    return tuple(domains)


def labels_of(domains: Sequence[Domain]) -> tuple[str, ...]:
    """The valid answers to the adaptation prompt: "others" first, then the domains' names."""
    return (OTHERS, *(domain.name for domain in domains))


def question(prompt: Prompt) -> str:
    """Words of the user: the text itself, or the user messages as paragraphs."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt.messages if isinstance(prompt, Problem) else prompt
    try:
        return "\n\n".join(message["content"] for message in messages if message["role"] == "user")
    except (KeyError, TypeError) as error:
        raise TypeError(
            "prompts: expected texts, problems, or lists of {'role': ..., 'content': ...}, "
            f"got {type(prompt).__name__} {prompt!r:.80}"
        ) from error


def adaptation_problem(prompt: Prompt, domains: Sequence[Domain], label: str | None = None) -> Problem:
    """The adaptation prompt around a prompt: which of the domains, or "others"? `label` is the right answer."""
    lines = [f"- {domain.name}: {domain.description}".removesuffix(": ") for domain in domains]
    system = "\n".join(
        [
            "Analyze the given question and classify it into one of these categories:",
            *lines,
            f"- {OTHERS}: anything else",
            "Consider the skills and knowledge required to answer the question. "
            "Reply with the name of the category only.",
        ]
    )
    messages = ({"role": "system", "content": system}, {"role": "user", "content": question(prompt)})
    return Problem(messages, reference=label, solution=label)


def said_label(answer: str, labels: Sequence[str]) -> str | None:
    """Label that a completion begins with, else the only one that it names, else None; case-insensitive."""
    longest_first = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    words = re.compile(rf"(?<!\w)({longest_first})(?!\w)", re.IGNORECASE)
    by_name = {label.casefold(): label for label in labels}
    text = answer.strip().lstrip("*_`\"'-([ ")
    if begins := words.match(text):
        return by_name[begins[1].casefold()]
    named = {found.casefold() for found in words.findall(text)}
    return by_name[named.pop()] if len(named) == 1 else None


class Classification(Task):
    """Task that classifies the prompts of other tasks by domain, inside the adaptation prompt.

    Labels are balanced and interleaved: every task gives each split as many prompts as the smallest task has.

    Args:
        tasks: by label: the names of `domains`, each once, and "others" if the base should keep something.
        domains: of the adaptation prompt.
        train_size, validation_size, test_size: maximum prompts per task in each split; None for no limit.
        max_new_tokens: maximum length of a label, in tokens.
    """

    name = "classify"

    def __init__(
        self,
        tasks: Mapping[str, Task],
        domains: Domains,
        *,
        train_size: int | None = None,
        validation_size: int | None = None,
        test_size: int | None = None,
        max_new_tokens: int = 8,
    ) -> None:
        self.domains = as_domains(domains)
        self.labels = labels_of(self.domains)
        missing = {domain.name for domain in self.domains} - set(tasks)
        if missing or not set(tasks) <= set(self.labels):
            raise ValueError(f"tasks: expected one for each of {', '.join(self.labels[1:])}, got {', '.join(tasks)}")
        for label, task in tasks.items():
            if not isinstance(task, Task):
                raise TypeError(f"tasks: expected a Task for {label}, got {type(task).__name__}")
        sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        for split, size in sizes.items():
            if size is not None:
                check_size(f"{split}_size", size)
        check_size("max_new_tokens", max_new_tokens)
        self.tasks = dict(tasks)
        self.sizes = sizes
        self.max_new_tokens = max_new_tokens
        self._made: dict[Split, list[Problem]] = {}

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, SPLITS)
        if split not in self._made:
            columns = [
                [
                    adaptation_problem(problem, self.domains, label)
                    for problem in task.problems(split)[: self.sizes[split]]
                ]
                for label, task in self.tasks.items()
            ]
            self._made[split] = [problem for row in zip(*columns, strict=False) for problem in row]
        return self._made[split]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        pairs = zip(problems, answers, strict=True)
        return [float(said_label(answer, self.labels) == problem.reference) for problem, answer in pairs]

    def expert_metadata(self) -> dict[str, str]:
        """Domains of the classification expert as a JSON list, which a bank's domains are checked against."""
        return {"domains": json.dumps([domain.name for domain in self.domains])}
