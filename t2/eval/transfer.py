"""Accuracy of a transferred expert beside the base and its shuffled controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from t2.experts.expert import Expert
from t2.experts.transfer import TransferOptions, transfer
from t2.generation.evaluate import evaluate_experts, figures
from t2.model.svf_model import SVFModel
from t2.tasks import Task


def measure(
    svf: SVFModel,
    expert: Expert,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    options: TransferOptions | None = None,
    *,
    problems: int = 200,
    shuffle_seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """The target's base, the transferred expert and its shuffled controls on a task's test split, as rows of the same
    batches; with a progress bar.

    Returns:
        what JSON takes: the models, options and, under "conditions", accuracy, Wilson's 95% interval and the score of
        each problem for "base", "ordered" and each "shuffled SEED".

    Raises:
        ValueError: `problems` is below 1, or as `transfer` does.
    """
    if problems < 1:
        raise ValueError(f"problems: expected at least 1, got {problems}")
    options = options or TransferOptions()
    seeds: dict[str, int | None] = {"ordered": None} | {f"shuffled {seed}": seed for seed in shuffle_seeds}
    moved = {name: transfer(expert, svf.layout, options, shuffle_seed=seed) for name, seed in seeds.items()}
    chosen = task.problems("test")[:problems]
    with tqdm(total=len(chosen), desc=task.name, unit="problem") as bar:
        found = evaluate_experts(
            svf, {"base": None, **moved}, task, chosen, tokenizer, announce=lambda done: bar.update(done - bar.n)
        )
    return {
        "model": svf.layout.base_model,
        "source": expert.layout.base_model,
        "source_fingerprint": expert.layout.fingerprint,
        "options": asdict(options),
        "task": task.name,
        "problems": len(chosen),
        "conditions": figures(found),
    }
