"""First half of the demo: one batch of requests from several domains, each completed by the expert of its domain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from t2.adaptation.bank_folder import BankFolder
from t2.adaptation.dispatch import ClassifierStrategy
from t2.adaptation.inference import TwoPass, as_problem, two_pass
from t2.generation.batching import pad
from t2.generation.prompts import encode
from t2.model.svf_model import SVFModel
from t2.tasks import Task, get
from t2.tasks.classify import BASE, question
from t2.weights.files import file_errors, read_json

NEW_TOKENS = 16


def bank_tasks(folder: Path) -> dict[str, Task]:
    """Tasks that a bank's experts were trained on, from `tasks.json`: {domain: {"name": ..., options of that task}}."""
    path = folder / "tasks.json"
    tasks = read_json(path, "tasks")
    with file_errors(path):
        return {domain: get(**task) for domain, task in tasks.items()}


def show_bank(
    out: Console,
    svf: SVFModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: BankFolder,
    tasks: dict[str, Task],
    others: Sequence[str],
    *,
    each: int = 9,
    rounds: int = 3,
) -> dict[str, Any]:
    """Complete `each` test examples of every domain and some `others` in one two-pass batch, and with the base.

    Returns:
        Accuracies, how often pass one was right, and seconds of both passes and of the base alone (medians).
    """
    bank.add_to(svf)
    strategy = ClassifierStrategy(svf, tokenizer, bank.domains)
    problems = [(domain, problem) for domain, task in tasks.items() for problem in task.problems("test")[:each]]
    requests = [problem for _, problem in problems] + [as_problem(text) for text in others]
    expected = [domain for domain, _ in problems] + [BASE] * len(others)
    ids, mask = pad([encode(request, tokenizer) for request in requests], int(tokenizer.pad_token_id), left=True)
    found: list[TwoPass] = []
    base_seconds: list[float] = []
    with out.status(f"two passes for {len(requests)} requests, and the base"):
        for _ in range(rounds):
            start = time.perf_counter()
            plain = svf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            base_seconds.append(time.perf_counter() - start)
            found.append(two_pass(svf, tokenizer, requests, strategy, max_new_tokens=NEW_TOKENS, do_sample=False))
    base = tokenizer.batch_decode(plain[:, ids.shape[1] :], skip_special_tokens=True)
    answers, adaptation = found[-1].answers, found[-1].adaptation
    chosen = [adaptation.names[int(row.argmax())] for row in adaptation.alpha]
    scores = {
        name: [tasks[domain].scores([problem], [texts[row]])[0] for row, (domain, problem) in enumerate(problems)]
        for name, texts in (("base", base), ("adapted", answers))
    }
    first = statistics.median(each.first_seconds for each in found)
    second = statistics.median(each.second_seconds for each in found)
    table = Table(
        "request", "expert", "base", "adapted", title="Pass one gives each request its expert, pass two answers"
    )
    for row in (*range(0, len(problems), max(1, each // 3)), *range(len(problems), len(requests))):
        marks = [("✓" if scores[name][row] == 1 else "✗") if row < len(problems) else "" for name in scores]
        table.add_row(
            _short(question(requests[row]), 46),
            f"{chosen[row]} ({adaptation.reasons[row].partition(',')[0].rpartition(' ')[2]})",
            f"{_short(base[row], 26)} {marks[0]}",
            f"{_short(answers[row], 26)} {marks[1]}",
        )
    out.print(table)
    figures = {
        "requests": len(requests),
        "dispatched_right": sum(a == b for a, b in zip(chosen, expected, strict=True)),
        "base_accuracy": statistics.fmean(scores["base"]),
        "adapted_accuracy": statistics.fmean(scores["adapted"]),
        "first_seconds": first,
        "second_seconds": second,
        "base_seconds": statistics.median(base_seconds),
        "new_tokens": NEW_TOKENS,
    }
    out.print(
        f"{figures['dispatched_right']} of {len(requests)} requests got the expert of their domain. "
        f"Right answers to the {len(problems)} problems: base {figures['base_accuracy']:.0%}, "
        f"adapted {figures['adapted_accuracy']:.0%}. Pass one {first:.2f} s, pass two {second:.2f} s; "
        f"the base alone {figures['base_seconds']:.2f} s (its answers are longer).\n"
    )
    return figures


def _short(text: str, length: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 12]}...{words[-9:]}"
