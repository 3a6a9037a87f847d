"""Any task of the package reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), with its own scorer."""

from __future__ import annotations

import difflib
import itertools
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from t2.tasks.base import Problem, Split, Task
from t2.tasks.dataset_task import check_size, check_split

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ANNOUNCED = re.compile(r"^.*?\banswer\b(?:\s+is)?\s*:?\s*", re.IGNORECASE | re.DOTALL)
DECORATION = " \t\n*_`\"'"
ORDER: tuple[Split, ...] = ("test", "validation", "train")
DRAWN_AT_ONCE = 1000
"""Entries of a data set that reasoning-gym is asked for; some it makes all at the start."""
MOST_REPEATS = 1000
"""Draws in a row without a new prompt after which a task counts as exhausted."""
DRAWN_BY_HASH = frozenset(
    ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)
"""Tasks of reasoning-gym 0.1.25 whose problems follow the order of Python's sets, and so the process's hash seed."""
DRAWN_ANEW = frozenset(("codeio",))
"""Those that run programs with random numbers of their own, which no seed reaches."""


def lenient(answer: str, reference: str) -> str:
    """Final answer in a completion, by the form of the reference.

    A number: the last number in the answer, its thousands without commas. One word: the first word after "The answer
    is" or "Answer:", or of the whole answer. Anything else: the text after such words, without quotes, asterisks and
    a full stop around it. One reading only: an answer that lists guesses does not get several chances.
    """
    if NUMBER.fullmatch(reference.strip()):
        found = NUMBER.findall(answer)
        return found[-1].replace(",", "") if found else answer.strip()
    said = ANNOUNCED.sub("", answer, count=1).strip(DECORATION)
    if re.fullmatch(r"\w+", reference.strip()):
        word = re.match(r"\w+", said)
        return word[0] if word else said
    return said.rstrip(".").strip(DECORATION)


class ReasoningGym(Task):
    """Problems that reasoning-gym makes, each prompt in one split and there once.

    Small tasks repeat: what a split has is left out of the ones drawn after it, in the order test, validation, train.
    Test problems so stay the same whatever the size of train.

    Args:
        dataset: the task's name in reasoning-gym.
        config: its options, as `{"min_terms": 2, "max_terms": 2}`.
        train_size, validation_size, test_size: problems in each split.
        seed: of all three.
        system_prompt: None for none.
        extraction: "strict" gives the scorer the stripped answer. "lenient" gives it what `lenient` finds, where the
            stripped answer is not fully right.
        partial_credit: scores as reasoning-gym gives them, instead of 1 for full marks and 0 for less.
        max_new_tokens: room for an answer.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: it has no such task, the task rejects its options, its problems are others in every process
            (`DRAWN_ANEW`; `DRAWN_BY_HASH` unless PYTHONHASHSEED=0), or it has fewer different prompts than the splits
            need (when they are first used).
    """

    def __init__(
        self,
        dataset: str,
        config: Mapping[str, Any] | None = None,
        *,
        train_size: int = 2000,
        validation_size: int = 100,
        test_size: int = 200,
        seed: int = 0,
        system_prompt: str | None = "Answer with the final answer only.",
        extraction: Literal["lenient", "strict"] = "lenient",
        partial_credit: bool = False,
        max_new_tokens: int = 16,
    ) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ImportError("this task is in the package reasoning-gym: pip install 't2kernels[tasks]'") from error
        if dataset not in DATASETS:
            near = difflib.get_close_matches(dataset, DATASETS, n=5) or sorted(DATASETS)
            raise ValueError(f"reasoning-gym has no task {dataset!r}; nearest: {', '.join(near)}")
        if dataset in DRAWN_ANEW:
            raise ValueError(
                f"dataset: {dataset} of reasoning-gym has other problems at every draw, so that training and test "
                f"problems would mix; expected a task with a seed (draw it once into a file for jsonl:PATH)"
            )
        if dataset in DRAWN_BY_HASH and sys.flags.hash_randomization:
            raise ValueError(
                f"dataset: {dataset} of reasoning-gym has other problems in every process, so that training and test "
                f"problems would mix; expected a process with the environment variable PYTHONHASHSEED=0"
            )
        sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        for split, size in sizes.items():
            check_size(f"{split}_size", size)
        check_size("max_new_tokens", max_new_tokens)
        if extraction not in ("lenient", "strict"):
            raise ValueError(f"extraction: expected 'lenient' or 'strict', got {extraction!r}")
        if reserved := {"size", "seed"} & set(config or {}):
            raise ValueError(f"config: {', '.join(sorted(reserved))} are options of the task, not of its config")
        self.name = f"reasoning-gym:{dataset}"
        self.dataset = dataset
        self.config = dict(config or {})
        self.sizes: dict[Split, int] = {"train": train_size, "validation": validation_size, "test": test_size}
        self.seed = seed
        self.system_prompt = system_prompt
        self.extraction = extraction
        self.partial_credit = partial_credit
        self.max_new_tokens = max_new_tokens
        self._scorer = self._create(size=1, seed=0)
        self._prompts: set[str] = set()
        self._drawn: dict[Split, list[Problem]] = {}

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, tuple(self.sizes))
        for each in ORDER[: ORDER.index(split) + 1]:
            if each not in self._drawn:
                self._drawn[each] = self._draw(each)
        return self._drawn[split]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [self._score(problem.reference, answer) for problem, answer in zip(problems, answers, strict=True)]

    def _score(self, entry: dict[str, Any], answer: str) -> float:
        score = self._own_score(entry, answer.strip())
        if score < 1 and self.extraction == "lenient" and entry["answer"] is not None:
            score = max(score, self._own_score(entry, lenient(answer, entry["answer"])))
        return score if self.partial_credit else float(score == 1.0)

    def _own_score(self, entry: dict[str, Any], answer: str) -> float:
        try:
            return float(self._scorer.score_answer(answer, entry))
        except Exception:  # scorers parse the answer, and not every one expects any text
            return 0.0

    def _create(self, size: int, seed: int) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.dataset, size=size, seed=seed, **self.config)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"config: {self.dataset} of reasoning-gym rejects {self.config}: {error}") from error

    def _draw(self, split: Split) -> list[Problem]:
        size, repeats = self.sizes[split], 0
        new: dict[str, Problem] = {}
        for entry in self._entries(split):
            question = entry["question"]
            repeats = repeats + 1 if question in self._prompts or question in new else 0
            if repeats == MOST_REPEATS:
                raise ValueError(
                    f"{split}_size: {size} problems asked for, but {self.dataset} with {self.config} gave {len(new)} "
                    f"that no other split has, then {MOST_REPEATS} repeats; ask for fewer, or widen its config"
                )
            if not repeats:
                new[question] = self._problem(entry)
            if len(new) == size:
                break
        self._prompts.update(new)
        return list(new.values())

    def _entries(self, split: Split) -> Iterator[dict[str, Any]]:
        """Without end, from one data set after the other, each with a seed of its own."""
        for part in itertools.count():
            source = self._create(DRAWN_AT_ONCE, random.Random(f"{self.seed} {split} {part}").randrange(1 << 31))
            yield from (source[index] for index in range(DRAWN_AT_ONCE))

    def _problem(self, entry: dict[str, Any]) -> Problem:
        system = ({"role": "system", "content": self.system_prompt},) if self.system_prompt else ()
        return Problem(
            messages=(*system, {"role": "user", "content": entry["question"]}),
            reference=entry,
            solution=entry["answer"],
        )
