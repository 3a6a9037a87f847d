"""HumanEval pass@1 of a model, greedy, its programs run in the sandbox.

    python -m benchmarks.tasks.humaneval

Appends completions to build/humaneval.jsonl, from which an interrupted run resumes, and writes
benchmarks/results/humaneval.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2 import tasks
from t2.sandbox import backend
from t2.tasks.humaneval import HumanEval
from t2.weights.machine import machine
from t2kernels.files import write_text


class Answers:
    """JSONL file of completions: a line of settings, then a line for each, replaced whole after every batch.

    Raises:
        ValueError: The file at `path` has other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = [settings]
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines()]
            if self.lines[0] != settings:
                raise ValueError(f"answers: {path} was made with {self.lines[0]}, now asked for {settings}; delete it")

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.lines += rows
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["task_id"]: row for row in self.lines[1:]}


def generate(answers: Answers, problems: list[t2.tasks.Problem], settings: dict[str, Any], batch_size: int) -> None:
    """Generates the completions that are missing, prompts of similar length in one batch."""
    model, tokenizer = t2.load(settings["model"])
    todo = [problem for problem in problems if problem.reference.task_id not in answers.rows]
    if not todo:
        return
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=getattr(torch, settings["dtype"])))
    prompts = {problem.reference.task_id: tasks.prompt_text(problem, tokenizer) for problem in todo}
    order = sorted(prompts, key=lambda task_id: len(tokenizer(prompts[task_id])["input_ids"]))
    for first in tqdm(range(0, len(order), batch_size), desc="batches"):
        ids = order[first : first + batch_size]
        start = time.perf_counter()
        batch = tokenizer([prompts[i] for i in ids], return_tensors="pt", padding=True, add_special_tokens=False)
        out = svf.generate(
            **batch, max_new_tokens=settings["new_tokens"], do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = out[:, batch["input_ids"].shape[1] :]
        seconds = (time.perf_counter() - start) / len(ids)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = (new == tokenizer.eos_token_id).any(-1).tolist()
        answers.add(
            [
                {"task_id": i, "answer": text, "ended": end, "seconds": seconds}
                for i, text, end in zip(ids, texts, ended, strict=True)
            ]
        )


def pass_table(results: Any) -> Table:
    """Score and times of the one model."""
    passed, count = len(results["passed"]), results["problems"]
    row = [
        f"{results['model']}, {results['dtype']}",
        f"{results['pass_at_1']:.1%} ({passed} of {count})",
        f"{results['generation_seconds']:.0f}",
        f"{results['running_seconds']:.0f}",
        f"{results['canonical_solutions_passed']} of {count}, {results['canonical_running_seconds']:.0f} s",
    ]
    return Table(
        f"Greedy, at most {results['new_tokens']} new tokens ({results['answers_cut_off']} answers reach that), "
        f"{results['machine']['processor']}, {results['machine']['threads']} threads; {results['timeout']:g} s a "
        f"program, {results['sandbox']}:",
        ["model", "pass@1", "seconds to generate", "seconds to run", "canonical solutions"],
        [row],
    )


def main(
    model: str = "smollm2-135m-instruct",
    new_tokens: int = 384,
    dtype: str = "float32",
    batch_size: int = 32,
    answers: Path = ROOT / "build" / "humaneval.jsonl",
    results: Path = RESULTS / "humaneval.json",
) -> None:
    """Args:
    model: Alias, Hub id, local folder or GGUF file.
    new_tokens: Longest completion.
    dtype: Storage of the factors.
    batch_size: Prompts in a batch.
    answers: File of completions; a run resumes from it.
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    isolation = backend()
    task = HumanEval(max_new_tokens=new_tokens)
    problems = list(task.problems("test"))
    settings = {"model": model, "new_tokens": new_tokens, "dtype": dtype}
    found = Answers(answers, settings)
    generate(found, problems, settings, batch_size)
    rows = [found.rows[problem.reference.task_id] for problem in problems]
    start = time.perf_counter()
    scores = task.scores(problems, [row["answer"] for row in rows])
    running = time.perf_counter() - start
    start = time.perf_counter()
    solved = task.scores(problems, [problem.solution or "" for problem in problems])
    report = {
        **settings,
        "machine": machine(),
        "sandbox": isolation,
        "timeout": task.limits.timeout,
        "problems": len(problems),
        "passed": [row["task_id"] for row, score in zip(rows, scores, strict=True) if score == 1],
        "pass_at_1": sum(scores) / len(scores),
        "answers_cut_off": sum(not row["ended"] for row in rows),
        "generation_seconds": round(sum(row["seconds"] for row in rows), 1),
        "running_seconds": round(running, 1),
        "canonical_solutions_passed": int(sum(solved)),
        "canonical_running_seconds": round(time.perf_counter() - start, 1),
    }
    write_results(results, report)
    pass_table(report).show()


if __name__ == "__main__":
    tyro.cli(main)
