"""What a task is: problems in three splits, a metric, and the reward that training maximises."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Problem:
    """One prompt, and what is needed to judge an answer to it.

    messages: the conversation, as {"role": ..., "content": ...}; with images, contents are lists as chat templates take
        them: [{"type": "image"}, {"type": "text", "text": ...}].
    reference: whatever the task's own metric needs.
    solution: a right answer in the words a model should use, for the next-token objective; None if there is none.
    images: one for each {"type": "image"}, in their order: PIL images, paths, or `t2.tasks.images.StoredImage`s.
    """

    messages: tuple[dict[str, Any], ...]
    reference: Any = None
    solution: str | None = None
    images: tuple[Any, ...] = ()


def user_message(text: str, images: int = 0) -> dict[str, Any]:
    """The user's words, behind so many images."""
    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    return {"role": "user", "content": parts if images else text}


class Task(ABC):
    """A set of problems with a metric. Splits are the same in every process and at every call."""

    name: str
    max_new_tokens: int
    """Room for an answer, in tokens."""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split; a ValueError says which splits there are if it is not one of them."""

    @abstractmethod
    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """The metric of each answer, in [0, 1]: 1 is right."""

    def rewards(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """What training maximises: 1 for a right answer, -1 for any other (arXiv 2501.06252, section 3.1)."""
        return [1.0 if score == 1.0 else -1.0 for score in self.scores(problems, answers)]

    def metadata(self) -> dict[str, str]:
        """Facts about the task that go into the metadata of experts trained on it."""
        return {}


def checked_rewards(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
    """The task's rewards; TypeError or ValueError, naming the task, unless they are one finite number an answer."""
    return _numbers(task, "rewards", task.rewards(problems, answers), len(answers))


def checked_scores(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
    """The task's scores; TypeError or ValueError, naming the task, unless they are one finite number an answer."""
    return _numbers(task, "scores", task.scores(problems, answers), len(answers))


def _numbers(task: Task, what: str, given: Any, count: int) -> list[float]:
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{what} of task {task.name}: expected a list of numbers, got {type(given).__name__}")
    values = list(given)
    if len(values) != count:
        raise ValueError(f"{what} of task {task.name}: expected one for each of {count} answers, got {len(values)}")
    for i, value in enumerate(values):
        try:
            number = float("nan") if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = float("nan")
        if not math.isfinite(number):
            raise ValueError(f"{what} of task {task.name}: expected finite numbers, got {value!r:.80} for answer {i}")
        values[i] = number
    return values


def prompt_text(problem: Problem, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """The prompt as the model reads it: through the chat template, or the contents one below the other without one."""
    messages = [dict(message) for message in problem.messages]
    if isinstance(tokenizer, ProcessorMixin):  # whose templates take lists of parts alone
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    if tokenizer.chat_template is None:
        return "\n\n".join(_plain(message["content"], tokenizer) for message in messages) + "\n\n"
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _plain(content: str | list[dict[str, str]], tokenizer: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(tokenizer.image_token if part["type"] == "image" else part["text"] for part in content)
