"""ARC: grade-school science questions with choices (Clark et al. 2018, arXiv 1803.05457)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from t2.tasks.base import Problem
from t2.tasks.data import Data, HubDataset, Row
from t2.tasks.dataset_task import DatasetTask


@dataclass(frozen=True)
class Choices:
    """The choices by label ("A" to "E", or "1" to "5" in some questions), and the right label."""

    texts: Mapping[str, str]
    right: str


def chosen_label(answer: str, choices: Choices) -> str | None:
    """The label an answer chooses, or None.

    In this order: a label that the answer begins with, alone on its line or before one of . ) : , (brackets and
    asterisks around it may be); the label after the last "answer is" or "answer:"; the choice whose text the answer is.
    """
    text = answer.strip()
    labels = "|".join(map(re.escape, choices.texts))
    if begins := re.match(rf"[(\[*]*({labels})[)\]*]*\s*(?:[.):,]|$)", text, re.MULTILINE):
        return begins[1]
    if named := re.findall(rf"(?i:answer(?:\s+is)?\s*:?)\s*[(\[*]*({labels})\b", text):
        return named[-1]
    bare = text.rstrip(".").casefold()
    return next((label for label, choice in choices.texts.items() if choice.rstrip(".").casefold() == bare), None)


class ARC(DatasetTask):
    """Rows {"question", "choices": {"text", "label"}, "answerKey"} as on the Hub, or as AI2 published them:
    {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}. Its own three splits.
    """

    def __init__(
        self,
        level: Literal["Easy", "Challenge"],
        data: Data = None,
        *,
        instruction: str | None = "Answer with the label of the right choice only.",
        max_new_tokens: int = 8,
    ) -> None:
        if level not in ("Easy", "Challenge"):
            raise ValueError(f"level: expected 'Easy' or 'Challenge', got {level!r}")
        self.name = f"arc-{level.lower()}"
        self.dataset = HubDataset("allenai/ai2_arc", (f"ARC-{level}",), ("train", "validation", "test"))
        super().__init__(data, validation_size=0, instruction=instruction, max_new_tokens=max_new_tokens)

    def problem(self, row: Row) -> Problem:
        if isinstance(row.fields.get("question"), Mapping):
            nested = Row(row.get("question", dict), f"{row.where}, field 'question'")
            stem, listed = nested.text("stem"), nested.get("choices", list)
            pairs = [(choice.get("label"), choice.get("text")) for choice in listed if isinstance(choice, Mapping)]
            complete = len(pairs) == len(listed)
        else:
            choices = row.get("choices", dict)
            stem, listed = row.text("question"), choices.get("label") or []
            pairs = list(zip(listed, choices.get("text") or [], strict=False))
            complete = len(listed) == len(choices.get("text") or [])
        texts = {label: text for label, text in pairs if isinstance(label, str) and isinstance(text, str) and label}
        if not complete or len(texts) < max(2, len(listed)):
            raise row.error("choices", "two or more texts, each with a label of its own", listed)
        key = row.text("answerKey")
        if key not in texts:
            raise row.error("answerKey", f"one of {', '.join(texts)}", key)
        lines = [stem, *(f"{label}. {text}" for label, text in texts.items())]
        return Problem(messages=self.messages("\n".join(lines)), reference=Choices(texts, key), solution=key)

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        pairs = zip(problems, answers, strict=True)
        return [float(chosen_label(answer, p.reference) == p.reference.right) for p, answer in pairs]
