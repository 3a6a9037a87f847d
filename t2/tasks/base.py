"""Interface of tasks: examples in three splits, a metric, and the reward that training maximises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Split = Literal["train", "validation", "test"]
FLOAT32_MAX = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Problem:
    """One example: a prompt, and the data that scores its completions.

    messages: the conversation, as {"role": ..., "content": ...}; with images, contents are lists as chat templates take
        them: [{"type": "image"}, {"type": "text", "text": ...}].
    reference: any data that the task's metric needs.
    solution: a right completion, for the next-token objective; None if there is none.
    images: one per {"type": "image"}, in order: PIL images, paths, or `t2.tasks.images.StoredImage`s.
    """

    messages: tuple[dict[str, Any], ...]
    reference: Any = None
    solution: str | None = None
    images: tuple[Any, ...] = ()


def user_message(text: str, images: int = 0) -> dict[str, Any]:
    """User message with a text, after this many images."""
    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    return {"role": "user", "content": parts if images else text}


class Task(ABC):
    """Examples with a metric. Splits are the same in every process and at every call."""

    name: str
    max_new_tokens: int
    """Maximum length of a completion, in tokens."""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """Examples of a split; ValueError, with the known splits, for any other."""

    @abstractmethod
    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """Metric of each completion, in [0, 1]: 1 is right."""

    def rewards(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """Rewards to maximise: 1 for a right completion, -1 for any other (arXiv 2501.06252, section 3.1)."""
        scores = finite_numbers("reward, made from scores", self, self.scores(problems, answers), answers)
        return [1.0 if score == 1.0 else -1.0 for score in scores]

    def expert_metadata(self) -> dict[str, str]:
        """Further metadata for experts trained on this task, beside its name and options."""
        return {}


def rewards_of(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
    """The task's rewards, one finite number for each answer.

    Raises:
        TypeError, ValueError: the task gives something else; the message says "reward" and names the task.
    """
    return finite_numbers("reward", task, task.rewards(problems, answers), answers)


def scores_of(task: Task, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
    """The task's scores, one finite number for each answer. Raises as `rewards_of` does, with "score"."""
    return finite_numbers("score", task, task.scores(problems, answers), answers)


def finite_numbers(what: str, task: Task, values: Any, answers: Sequence[str]) -> list[float]:
    """Check that values are finite float32 numbers, one per completion, and return them as a list.

    Bools and NumPy's or torch's numbers and vectors are accepted; texts are not.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str | bytes | Mapping) or not isinstance(listed, Iterable):
        raise TypeError(f"{what}: expected a list of numbers from task {task.name}, got {type(values).__name__}")
    listed = list(listed)
    if len(listed) != len(answers):
        raise ValueError(
            f"{what}: expected a number for each of {len(answers)} answers from task {task.name}, got {len(listed)}"
        )
    return [_finite_number(what, task, value, answer) for value, answer in zip(listed, answers, strict=True)]


def _finite_number(what: str, task: Task, value: Any, answer: str) -> float:
    from torch import Tensor

    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    number: Any = plain
    if isinstance(plain, Real) and abs(number) <= FLOAT32_MAX:
        return float(number)
    raise ValueError(f"{what}: expected a finite number from task {task.name}, got {value!r:.80} for {answer!r:.200}")


def prompt_text(problem: Problem, tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """Prompt as the model reads it: through the chat template or, without one, the contents in separate paragraphs."""
    from transformers import ProcessorMixin

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
