"""The `t2 adapt` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from t2.adaptation.options import FewShotOptions
from t2.cli.options import OPTIONAL, Bank, Candidates, FactorDtype, Model, TaskOptions, Unchecked
from t2.tasks.base import Split


@dataclass(frozen=True)
class Given(Unchecked, FewShotOptions):
    """The search's options of the command line."""


def run(
    model: Model,
    task: Annotated[str, arg(metavar="TASK")],
    output: Annotated[Path, arg(metavar="FILE")],
    search: OmitArgPrefixes[Given],
    bank: Bank = None,
    candidates: Candidates = (),
    task_options: TaskOptions = "{}",
    few_shot: int = 10,
    split: Split = "train",
    incumbent: Annotated[str, arg(metavar="NAME")] = "base",
    factor_dtype: FactorDtype = "float32",
    max_new_tokens: Annotated[int | None, arg(metavar="INT", help_behavior_hint=OPTIONAL)] = None,
) -> int:
    """Search for the mix of experts that does best on a few examples of a task. Ctrl-C keeps the progress so far.

    Example: t2 adapt smollm2-135m-instruct --bank experts/mine --task gsm8k --few-shot 10 --output gsm8k.safetensors

    Args:
        task: Task to adapt to, such as gsm8k, reasoning-gym:chain_sum or jsonl:FILE.
        output: File for the mixed expert (*.safetensors).
        search: "Published" means arXiv 2501.06252.
        few_shot: Number of examples that candidates are scored on.
        split: Split that these examples come from; do not evaluate the result on it.
        incumbent: Expert kept unless the best mix wins by `--margin` standard errors: base, an expert's name, or the
            dispatcher's majority choice (prompt, classifier).
        max_new_tokens: Maximum length of a completion, in tokens; the default is the task's.
    """
    from rich.console import Console

    from t2.adaptation.command import adapt_to_task, open_bank

    finished = adapt_to_task(
        model,
        open_bank(bank, candidates),
        task,
        output,
        task_options=task_options,
        few_shot=few_shot,
        split=split,
        dtype=factor_dtype,
        max_new_tokens=max_new_tokens,
        options=FewShotOptions(**vars(search)),
        incumbent=incumbent,
        console=Console(),
    )
    return 0 if finished else 130
