"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from t2.tasks.base import Problem
from t2.tasks.data import Data, HubDataset, Row
from t2.tasks.dataset_task import DatasetTask

NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
MARKED = re.compile(rf"####\s*({NUMBER})")
ANY = re.compile(NUMBER)
CALCULATOR = re.compile(r"<<[^>]*>>")


def number(text: str) -> Decimal | None:
    """The value of a number as people write it ("$1,234.50"); None if it isn't one."""
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def final_number(answer: str) -> Decimal | None:
    """The number after the last "####", the data set's own mark, or else the last number of the answer."""
    found = MARKED.findall(answer) or ANY.findall(answer)
    return number(found[-1]) if found else None


class GSM8K(DatasetTask):
    """Rows {"question", "answer"}; the answer ends with "#### NUMBER". Scored by that number.

    The solution is the row's answer without its calculator annotations (<<48/2=24>>).
    """

    name = "gsm8k"
    dataset = HubDataset("openai/gsm8k", ("main",))

    def __init__(
        self,
        data: Data = None,
        *,
        validation_size: int = 500,
        instruction: str | None = 'Solve the problem step by step. End with a line "#### " and the number.',
        max_new_tokens: int = 256,
    ) -> None:
        super().__init__(data, validation_size=validation_size, instruction=instruction, max_new_tokens=max_new_tokens)

    def problem(self, row: Row) -> Problem:
        answer = row.text("answer")
        marked = MARKED.findall(answer)
        if not marked:
            raise row.error("answer", "a text that ends with '#### NUMBER'", answer)
        return Problem(
            messages=self.messages(row.text("question")),
            reference=number(marked[-1]),
            solution=CALCULATOR.sub("", answer),
        )

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        pairs = zip(problems, answers, strict=True)
        return [float(final_number(answer) == problem.reference) for problem, answer in pairs]
