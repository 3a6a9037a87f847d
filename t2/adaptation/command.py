"""Implementation of `t2 adapt` and `t2 generate --adapt`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from t2.adaptation.bank_folder import CLASSIFIER, BankFolder, load_bank_folder, named_experts
from t2.adaptation.few_shot import FewShotResult, FewShotStrategy, few_shot_problems
from t2.adaptation.inference import two_pass
from t2.adaptation.options import FewShotOptions
from t2.adaptation.search import SearchProgress
from t2.adaptation.strategies import PASS_ONE, PassOne, pass_one
from t2.generation.sampling import Sampling
from t2.model.svf_model import SVFConfig, SVFModel
from t2.tasks import Split, get, options_of
from t2.weights.loading import load


def open_bank(bank: Path | None, candidates: Sequence[str], domains: Sequence[str] = ()) -> BankFolder:
    """Bank of a folder, or of NAME=FILE pairs with NAME=DESCRIPTION ones."""
    if (bank is None) == (not candidates):
        got = "both" if candidates else "neither"
        raise ValueError(f"bank: expected a folder, or candidates as NAME=FILE, got {got}")
    if bank is not None:
        if domains:
            raise ValueError("domains: expected none beside a bank, whose domains.json has them")
        return load_bank_folder(bank)
    pairs = [text.partition("=") for text in domains]
    if not all(name and equals for name, equals, _ in pairs):
        raise ValueError(f"domains: expected NAME=DESCRIPTION, got {list(domains)}")
    return named_experts(candidates, {name: description for name, _, description in pairs})


def open_model(name: str, dtype: str, bank: BankFolder, *, bf16_products: bool = False) -> tuple[SVFModel, Any]:
    """Model with SVF in all matrices of the bank's experts and these experts added; and its tokenizer."""
    model, tokenizer = load(name)
    layout = next(iter(bank.experts.values())).layout
    storage = getattr(torch, dtype)
    svf = SVFModel(model, SVFConfig(list(layout.names), storage, bf16_products=bf16_products))
    bank.add_to(svf)
    return svf, tokenizer


def _check_classifier(argument: str, strategy: str, bank: BankFolder) -> None:
    if strategy == CLASSIFIER and bank.classifier is None:
        raise ValueError(f"{argument}: expected a bank with a classification expert, named {CLASSIFIER!r}, got none")


def answer(
    model: str,
    prompts: Sequence[str],
    bank: BankFolder,
    strategy: PassOne,
    *,
    dtype: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> None:
    """Print each prompt, the expert that pass one chose and why, and the completion; then both passes' seconds."""
    _check_classifier("adapt", strategy, bank)
    svf, tokenizer = open_model(model, dtype, bank)
    chosen = pass_one(strategy, svf, tokenizer, bank.domains)
    result = two_pass(svf, tokenizer, prompts, chosen, max_new_tokens=max_new_tokens, **sampling.seeded())
    adaptation = result.adaptation
    for prompt, row, reason, text in zip(prompts, adaptation.alpha, adaptation.reasons, result.answers, strict=True):
        print(f"> {prompt}\n[{adaptation.names[int(row.argmax())]}: {reason}]\n{text.strip()}\n")
    print(f"first pass {result.first_seconds:.2f} s, second pass {result.second_seconds:.2f} s")


def adapt_to_task(
    model: str,
    bank: BankFolder,
    task_name: str,
    output: Path,
    *,
    task_options: str,
    few_shot: int,
    split: Split,
    dtype: str,
    max_new_tokens: int | None,
    options: FewShotOptions,
    incumbent: str,
    console: Console,
) -> bool:
    """Few-shot search of `t2 adapt`; False if interrupted, with its progress saved beside the output.

    incumbent: "base", an expert's name, or the name of a strategy of pass one.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"output: expected a file named *.safetensors, got {output}")
    _check_classifier("incumbent", incumbent, bank)
    task = get(task_name, **options_of(task_options))
    problems = few_shot_problems(task, few_shot, split=split, seed=options.seed)
    svf, tokenizer = open_model(model, dtype, bank)
    memory = output.with_suffix(".search.json")
    with _progress(console, task.name, options.generations) as announce:
        strategy = FewShotStrategy(
            svf,
            tokenizer,
            task,
            problems,
            options=options,
            experts=[domain.name for domain in bank.domains],
            incumbent=pass_one(incumbent, svf, tokenizer, bank.domains) if incumbent in PASS_ONE else incumbent,
            new_tokens=max_new_tokens,
            memory=memory,
            announce=announce,
        )
        try:
            result = strategy.search()
        except KeyboardInterrupt:
            console.print(f"Interrupted. The same command continues from {memory}.")
            return False
    strategy.expert().save(output)
    memory.unlink(missing_ok=True)
    _show(console, result, len(problems))
    console.print(f"{output}: {result.stopped}, {result.seconds:.1f} s")
    return True


@contextmanager
def _progress(console: Console, name: str, generations: int) -> Iterator[Callable[[SearchProgress], None]]:
    columns = (TextColumn(name), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as bar:
        line = bar.add_task("the base, each expert, and the first mixes", total=generations)

        def announce(found: SearchProgress) -> None:
            last = found.generations[-1]
            text = f"best {last.best.score:.1%}, mean {last.mean:.1%}, {last.evaluated} new, {last.seconds:.1f} s"
            if not console.is_terminal:  # a log gets lines instead
                console.print(f"generation {len(found.generations)}/{generations}: {text}", highlight=False)
            bar.update(line, completed=len(found.generations), description=text)

        yield announce


def _show(console: Console, result: FewShotResult, problems: int) -> None:
    weights = result.mean_alpha
    table = Table("", "weight", f"right of {problems}", "log-likelihood of right answers")
    for name, fitness in result.singles.items():
        table.add_row(name, f"{weights[name]:.3f}", f"{fitness.score:.1%}", f"{fitness.log_likelihood:.3f}")
    table.add_row("the mix", "", f"{result.fitness.score:.1%}", f"{result.fitness.log_likelihood:.3f}")
    console.print(table)
    if result.groups:
        console.print(f"weights are means over {len(result.alpha)} groups of matrices")
