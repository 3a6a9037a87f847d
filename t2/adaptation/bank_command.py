"""Implementation of `t2 bank`, less the training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from t2.adaptation.bank_edit import DomainStatus, bank_status, held_out_prompts
from t2.adaptation.bank_folder import load_bank_folder, trained_domains
from t2.adaptation.dispatch import ClassifierStrategy
from t2.experts.expert import Expert
from t2.model.load import load_svf
from t2.model.svf_model import SVFConfig
from t2.tasks.classify import BASE, OTHERS, Domain
from t2.weights.loading import tokenizer_of

ASK_AT_ONCE = 64


def show(folder: Path, statuses: Sequence[DomainStatus], console: Console) -> None:
    """Prints a bank's domains as a table."""
    table = Table("domain", "description", "prompts", "in the classifier", title=str(folder), title_justify="left")
    for status in statuses:
        known = {True: "yes", False: "no", None: "its file does not say"}[status.known]
        table.add_row(status.domain.name, status.domain.description, str(sum(status.prompts.values())), known)
    console.print(table)
    for line in advice(folder, statuses):
        console.print(line, markup=False)


def advice(folder: Path, statuses: Sequence[DomainStatus]) -> list[str]:
    """Lines on what keeps automatic choice from knowing all domains."""
    if not statuses:
        return [f"no domains yet: t2 bank add {folder} --name NAME --expert FILE --description TEXT --task TASK"]
    found = [
        f"{status.domain.name}: no prompts of its own: t2 bank add {folder} --name {status.domain.name} --task TASK"
        for status in statuses
        if not all(status.prompts.values())
    ]
    unknown = [status.domain.name for status in statuses if status.known is False]
    if unknown:
        found.append(
            f"`auto` never chooses {', '.join(unknown)}: t2 bank train-classifier MODEL {folder} trains a "
            "classification expert for all domains"
        )
    return found


def check(folder: Path, console: Console) -> bool:
    """Reads everything and says what is missing; whether nothing is."""
    statuses = bank_status(folder)
    if statuses:
        load_bank_folder(folder)
    found = advice(folder, statuses)
    for line in found or [f"{folder}: {len(statuses)} domains, all known to the classification expert"]:
        console.print(line, markup=False)
    return not found


def dispatch_accuracy(model: str, classifiers: Mapping[str, Expert], folder: Path) -> dict[str, dict[str, float]]:
    """Share of the bank's held-out prompts that each classification expert gives the right label, by label.

    A classification expert chooses among the domains it was trained on; prompts of others it can't get right.
    """
    bank = load_bank_folder(folder)
    prompts = held_out_prompts(folder, bank.domains)
    layout = next(iter(bank.experts.values())).layout
    svf, processor = load_svf(model, SVFConfig(list(layout.names), torch.bfloat16, bf16_products=True))
    bank.add_to(svf)
    found = {}
    for name, classifier in classifiers.items():
        svf.add_expert("asked", classifier, replace=True)
        known = trained_domains(classifier)
        domains = [Domain(d.name, d.description) for d in bank.domains if known is None or d.name in known]
        strategy = ClassifierStrategy(svf, tokenizer_of(processor), domains, "asked")
        right, count = Counter[str](), Counter[str]()
        for first in range(0, len(prompts), ASK_AT_ONCE):
            asked = prompts[first : first + ASK_AT_ONCE]
            adaptation = strategy.adapt([words for _, words in asked])
            for (label, _), row in zip(asked, adaptation.alpha, strict=True):
                chosen = adaptation.names[int(row.argmax())]
                right[label] += label == (OTHERS if chosen == BASE else chosen)
                count[label] += 1
        found[name] = {label: right[label] / count[label] for label in count}
    return found


def show_accuracy(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Prints `dispatch_accuracy` as a table."""
    labels = list(next(iter(found.values())))
    table = Table("classification expert", *labels, title="right label, prompts that training did not see")
    for name, shares in found.items():
        table.add_row(name, *(f"{shares[label]:.0%}" for label in labels))
    console.print(table)
