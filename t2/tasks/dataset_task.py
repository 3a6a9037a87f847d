"""Base class of tasks made from published data sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property

from t2.tasks.base import Problem, Split, Task
from t2.tasks.data import Data, HubDataset, Row, hold_out, read_problems, read_split
from t2.weights.files import file_errors


def check_split(task: Task, split: str, known: Sequence[str]) -> None:
    if split not in known:
        raise ValueError(f"split: {task.name} has {', '.join(known)}, got {split!r}")


def check_size(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


class DatasetTask(Task):
    """A published data set. Train and test are its own splits; validation its own, or a part held out of train.

    Args:
        data: as in `t2.tasks.data.read_split`; None reads the Hub.
        validation_size: problems held out of train, where the data set has no validation split of its own.
        instruction: the system prompt; None for none.
        max_new_tokens: room for an answer.
    """

    dataset: HubDataset

    def __init__(
        self,
        data: Data = None,
        *,
        validation_size: int,
        instruction: str | None,
        max_new_tokens: int,
    ) -> None:
        check_size("max_new_tokens", max_new_tokens)
        check_size("validation_size", validation_size, least=0)
        self.data = data
        self.validation_size = validation_size
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, ("train", "validation", "test"))
        if split == "test" or "validation" in self.dataset.splits:
            return self._read(split)
        train, validation = self._train_and_validation
        return train if split == "train" else validation

    @cached_property
    def _train_and_validation(self) -> tuple[list[Problem], list[Problem]]:
        with nullcontext() if self.data is None else file_errors(f"{self.name}, {self.data}"):
            return hold_out(self._read("train"), self.validation_size, "validation_size")

    def _read(self, split: str) -> list[Problem]:
        if split not in self._problems:
            self._problems[split] = read_problems(
                self.rows(split), self.problem, f"{self.name}, {split} of {self.data or 'the Hub'}"
            )
        return self._problems[split]

    def rows(self, split: str) -> list[Row]:
        """The rows of one of the data set's own splits."""
        return read_split(self.data, self.dataset, split)

    @cached_property
    def _problems(self) -> dict[str, list[Problem]]:
        return {}

    @abstractmethod
    def problem(self, row: Row) -> Problem:
        """The problem of one row; a FileFormatError names the field that is not what it should be."""

    def messages(self, question: str) -> tuple[dict[str, str], ...]:
        system = ({"role": "system", "content": self.instruction},) if self.instruction else ()
        return (*system, {"role": "user", "content": question})
