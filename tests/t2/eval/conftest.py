from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import t2
from t2.adaptation import load_bank_folder, save_bank_folder
from t2.eval import EvalRunner, EvalSpec, ResultCache
from t2.eval.spec import parse_spec

SEARCH = {"population": 10, "generations": 2}


@pytest.fixture
def bank(folder: Path, tmp_path: Path) -> Path:
    """A folder with two experts and a classifier for the tiny model."""
    model, _ = t2.load(folder)
    layout = t2.SVFModel(model, t2.SVFConfig(progress=False)).layout
    made = {name: t2.Expert.random(layout, std=2.0, seed=seed) for seed, name in enumerate("ad")}
    save_bank_folder(tmp_path / "bank", {"a": "b c", "d": "e"}, made, t2.Expert.random(layout, std=2.0, seed=5))
    return tmp_path / "bank"


@pytest.fixture
def task(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """The plan of a task: right is an answer in which a word of five comes first."""

    def make(words: str) -> dict[str, Any]:
        path = tmp_path / f"{words}.jsonl"
        prompts = [" ".join((words * 40)[i % 3 : i % 3 + 1 + i % 7]) + " a" * (i // 7) for i in range(90)]
        rows = [{"prompt": prompt, "answer": words[i % len(words)]} for i, prompt in enumerate(prompts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        judge = tmp_path / "judge.py"
        judge.write_text("def said(answer, row):\n    return 1.0 if row['answer'] in answer else -1.0\n")
        return {"task": f"jsonl:{path}", "options": {"reward": f"{judge}:said", "max_new_tokens": 4, "test_size": 16}}

    return make


@pytest.fixture
def content(task: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return {
        "seen": {"a": task("abc"), "d": task("de")},
        "unseen": {"new": task("cae")},
        "problems": 8,
        "few_shot": [4],
        "few_shot_sizes": [2, 4],
        "few_shot_seeds": [0, 1],
        "search": SEARCH,
        "dispatch_prompts": 8,
        "times_requests": 4,
        "times_rounds": 2,
    }


@pytest.fixture
def plan(content: dict[str, Any]) -> EvalSpec:
    return parse_spec(content)


@pytest.fixture
def measuring(folder: Path, bank: Path, plan: EvalSpec, tmp_path: Path) -> Callable[..., EvalRunner]:
    """A new process' measuring, over the same cells."""

    def make(plan: EvalSpec = plan, **options: Any) -> EvalRunner:
        model, tokenizer = t2.load(folder)
        svf, loaded = t2.SVFModel(model, t2.SVFConfig(progress=False)), load_bank_folder(bank)
        loaded.add_to(svf)
        return EvalRunner(svf, tokenizer, loaded, plan, ResultCache(tmp_path / "cells"), **options)

    return make
