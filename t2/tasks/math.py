"""MATH: competition mathematics (Hendrycks et al. 2021, arXiv 2103.03874), judged by math-verify."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from t2.tasks.base import Problem
from t2.tasks.data import Data, HubDataset, Row
from t2.tasks.dataset_task import DatasetTask

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SECONDS = 5


def last_boxed(text: str) -> str | None:
    """The last "\\boxed{...}" of a text with its braces matched, or None."""
    start = text.rfind("\\boxed{")
    depth = 0
    for end in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[start : end + 1]
    return None


class MATH(DatasetTask):
    """Rows {"problem", "level", "type", "solution"}; the solution has its answer in "\\boxed{...}".

    math-verify finds the answer's last formula or number and compares the two as mathematics.
    """

    name = "math"
    dataset = HubDataset("EleutherAI/hendrycks_math", SUBJECTS)

    def __init__(
        self,
        data: Data = None,
        *,
        validation_size: int = 500,
        instruction: str | None = "Solve the problem step by step. Put the final answer in \\boxed{}.",
        max_new_tokens: int = 512,
    ) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ImportError("math answers are judged by math-verify: pip install 't2kernels[tasks]'") from error
        super().__init__(data, validation_size=validation_size, instruction=instruction, max_new_tokens=max_new_tokens)

    def problem(self, row: Row) -> Problem:
        solution = row.text("solution")
        boxed = last_boxed(solution)
        if boxed is None:
            raise row.error("solution", "a text with \\boxed{...}", solution)
        return Problem(messages=self.messages(row.text("problem")), reference=boxed, solution=solution)

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        from math_verify import parse, verify

        # Its time limit is an alarm signal, which only the main thread gets.
        seconds = SECONDS if threading.current_thread() is threading.main_thread() else None

        def right(reference: str, answer: str) -> bool:
            target = parse(f"${reference}$", parsing_timeout=seconds)
            return bool(verify(target, parse(answer, parsing_timeout=seconds), timeout_seconds=seconds))

        return [float(right(p.reference, answer)) for p, answer in zip(problems, answers, strict=True)]
