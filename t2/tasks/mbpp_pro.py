"""MBPP Pro: a basic Python problem, and a harder one that calls its solution (Yu et al. 2024, arXiv 2412.21199)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from t2.sandbox import Limits, Test
from t2.tasks.base import Problem, Split
from t2.tasks.code import CodeTask, definition, extract_code
from t2.tasks.data import Data, HubDataset, Row, hold_out, read_problems, read_split
from t2.tasks.dataset_task import check_size, check_split

DATASET = HubDataset("CodeEval-Pro/mbpp-pro", splits=("train",))
IMPORTS = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)
FUNCTIONS = re.compile(r"^def\s+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """The tests of a problem, with the imports and the names of functions in its two prompts."""

    test_code: str
    imports: str
    functions: tuple[str, ...]


class MBPPPro(CodeTask):
    """Rows {"id", "raw_problem", "raw_solution", "new_problem", "new_solution", "test_code"}.

    The data set has one split of 378 rows, which its authors use as a test: validation and test are held out of it, so
    figures on `test` are not the published benchmark's (`validation_size=0, test_size=377` comes closest).

    Args:
        data: as in `t2.tasks.data.read_split`; None reads the Hub.
        validation_size, test_size: problems held out.
        instruction: what stands before the two problems in the user's message.
        max_new_tokens: room for an answer.
        limits, allow_unsandboxed: as in `CodeTask`.

    Tests call the program's functions; the modules that they use are those that the prompts import.
    """

    name = "mbpp-pro"

    def __init__(
        self,
        data: Data = None,
        *,
        validation_size: int = 50,
        test_size: int = 100,
        instruction: str = (
            "Solve both problems in one Python code block. The second function calls the first one, so define both."
        ),
        max_new_tokens: int = 512,
        limits: Limits | None = None,
        allow_unsandboxed: bool = False,
    ) -> None:
        check_size("max_new_tokens", max_new_tokens)
        check_size("validation_size", validation_size, least=0)
        check_size("test_size", test_size, least=0)
        super().__init__(limits, allow_unsandboxed=allow_unsandboxed)
        self.data = data
        self.validation_size = validation_size
        self.test_size = test_size
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, tuple(self._splits))
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        every = read_problems(read_split(self.data, DATASET, "train"), self.problem)
        rest, test = hold_out(every, self.test_size, "test_size")
        train, validation = hold_out(rest, self.validation_size, "validation_size")
        return {"train": train, "validation": validation, "test": test}

    def problem(self, row: Row) -> Problem:
        first, second = row.text("raw_problem").strip(), row.text("new_problem").strip()
        solutions = _whole(first, row.text("raw_solution")), _whole(second, row.text("new_solution"))
        content = f"{self.instruction}\n```python\n{first}\n\n{second}\n```"
        return Problem(
            messages=({"role": "user", "content": content},),
            reference=Suite(
                row.text("test_code"),
                "\n".join(IMPORTS.findall(f"{first}\n{second}")),
                tuple(FUNCTIONS.findall(f"{first}\n{second}")),
            ),
            solution="```python\n{}\n\n\n{}\n```".format(*solutions),
        )

    def test(self, problem: Problem, answer: str) -> Test:
        suite: Suite = problem.reference
        return Test(extract_code(answer), suite.test_code, prelude=suite.imports, functions=suite.functions)


def _whole(problem: str, solution: str) -> str:
    """A solution that defines its function; those of the data set go on after the signature in the problem."""
    names = FUNCTIONS.findall(problem)
    if names and definition(solution, names[-1]) is None:
        return f"{problem}\n{solution.rstrip()}"
    return solution.strip()
