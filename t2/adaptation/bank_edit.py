"""Banks that grow: domains with their expert, a description and prompts, and a classification expert for all of them.

    FOLDER/prompts/NAME/{train,validation,test}.jsonl    prompts of a domain, {"prompt": ..., "answer": NAME} a line
    FOLDER/prompts/others/...                            prompts that the base answers

The prompts are what a classification expert is trained on, so that one for more domains needs nothing but the folder.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2.adaptation.bank_folder import (
    CLASSIFIER,
    FORMAT,
    FORMAT_VERSION,
    SHIPPED,
    bank_path,
    check_file_name,
    load_bank_folder,
    trained_domains,
)
from t2.experts.expert import Expert
from t2.tasks.base import Problem, Split, Task
from t2.tasks.classify import OTHERS, Domain, as_domains, labels_of, question
from t2.tasks.jsonl import JsonlTask
from t2.weights.files import FileFormatError, atomic_directory
from t2kernels.files import replacing, write_text

SIZES: Mapping[Split, int] = {"train": 300, "validation": 40, "test": 60}
"""Most prompts of a domain that a bank keeps, by split."""
GENERAL = SHIPPED / "general-questions.jsonl"


@dataclass(frozen=True)
class DomainStatus:
    """Prompts of one domain in a bank; and whether its classification expert knows it, None where no file says so."""

    domain: Domain
    prompts: Mapping[Split, int]
    known: bool | None


def init_bank(folder: Path, copy_of: Path | None = None) -> None:
    """Makes a bank without domains, whose prompts for the base are the packaged general questions; or a copy.

    Args:
        copy_of: the bank that is copied: a folder, or the name of one that ships.

    Raises:
        FileExistsError: there is something already.
        FileNotFoundError, FileFormatError: what is to be copied is no bank.
    """
    if folder.exists():
        raise FileExistsError(f"bank: expected a new folder, {folder} exists")
    if copy_of is not None:
        source = bank_path(copy_of)
        load_bank_folder(source)
        with atomic_directory(folder) as temporary:
            shutil.copytree(source, temporary, dirs_exist_ok=True)
        return
    general = JsonlTask(GENERAL, validation_size=SIZES["validation"], test_size=SIZES["test"])
    with atomic_directory(folder) as temporary:
        _write_prompts(temporary / "prompts" / OTHERS, OTHERS, _prompts_of(general))


def add_domain(
    folder: Path,
    name: str,
    expert: Path,
    *,
    description: str | None = None,
    task: Task | None = None,
    replace: bool = False,
) -> DomainStatus:
    """Adds a domain to a bank, which is made if it is not there. The folder is as it was if this fails.

    Args:
        expert: file of the domain's expert.
        description: one line on its questions; default that in the expert's metadata.
        task: gives the prompts that the bank keeps; None keeps none, or with `replace` those that are there.
        replace: the bank has a domain of this name already.

    Raises:
        ValueError: a name that is taken or no file name, no description, an expert of another base.
        FileNotFoundError, FileFormatError: a file is missing or damaged.
    """
    check_file_name(name)
    vector = Expert.load(expert)
    domains = _domains(folder) if folder.exists() else {}
    if (name in domains) != replace:
        wanted = "one that the bank has" if replace else "a new one; replace takes the place of a domain"
        raise ValueError(f"name: expected {wanted}, got {name!r} beside {', '.join(domains) or 'no domains'}")
    about = vector.metadata.get("description") or domains.get(name)
    text = description if description is not None else about
    if not text:
        raise ValueError(f"description: expected one line on the questions of {name!r}, got none")
    domain = Domain(name, text)
    for other in domains:
        if other != name:
            Expert.load(folder / f"{other}.safetensors").layout.check_same(vector.layout, f"expert {name!r}")
            break
    prompts = None if task is None else _prompts_of(task)
    if not folder.exists():
        init_bank(folder)
    if prompts is not None:
        _write_prompts(folder / "prompts" / name, name, prompts)
    with replacing(folder / f"{name}.safetensors") as temporary:
        shutil.copyfile(expert, temporary)
    _write_domains(folder, domains | {domain.name: domain.description})
    return next(status for status in bank_status(folder) if status.domain.name == name)


def remove_domain(folder: Path, name: str) -> None:
    """Takes a domain out of a bank, with its expert and its prompts.

    Raises:
        ValueError: the bank has no such domain, or no other one.
    """
    domains = _domains(folder)
    if name not in domains:
        raise ValueError(f"name: expected one of {', '.join(domains) or 'no domains'}, got {name!r}")
    if len(domains) == 1:
        raise ValueError(f"name: expected a bank with other domains than {name!r}; delete the folder {folder} instead")
    _write_domains(folder, {other: text for other, text in domains.items() if other != name})
    (folder / f"{name}.safetensors").unlink()
    shutil.rmtree(folder / "prompts" / name, ignore_errors=True)


def bank_status(folder: Path) -> list[DomainStatus]:
    """Every domain of a bank.

    Raises:
        FileNotFoundError, FileFormatError: the folder is no bank, or a file is missing or damaged.
    """
    if not (folder / "domains.json").exists() and (folder / "prompts").is_dir():
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of domains that the classification expert does not know
        bank = load_bank_folder(folder)
    known = None if bank.classifier is None else trained_domains(bank.classifier)
    return [
        DomainStatus(
            domain,
            _counts(folder, domain.name),
            False if bank.classifier is None else None if known is None else domain.name in known,
        )
        for domain in bank.domains
    ]


def classifier_task(folder: Path) -> tuple[str, str]:
    """The task that trains a classification expert for all domains of a bank: its name, and its options as JSON.

    Raises:
        ValueError: a domain, or what the base answers, has no prompts for each split.
    """
    statuses = bank_status(folder)
    if not statuses:
        raise ValueError(f"bank: expected domains in {folder}, got none; `t2 bank add` adds one")
    for label in (OTHERS, *(status.domain.name for status in statuses)):
        if lacking := [split for split, count in _counts(folder, label).items() if not count]:
            raise ValueError(
                f"bank: expected prompts of {label!r} for {', '.join(lacking)} in {folder / 'prompts' / label}, got "
                f"none; `t2 bank add {folder} --name {label} --task TASK` keeps some"
            )
    tasks = {
        label: {"name": f"jsonl:{(folder / 'prompts' / label).resolve()}"}
        for label in labels_of([status.domain for status in statuses])
    }
    domains = {status.domain.name: status.domain.description for status in statuses}
    return "classify", json.dumps({"tasks": tasks, "domains": domains})


def held_out_prompts(folder: Path, domains: Sequence[Domain]) -> list[tuple[str, str]]:
    """(label, prompt) of every test prompt of these domains and of the base."""
    found = []
    for label in labels_of(domains):
        task = JsonlTask(folder / "prompts" / label)
        found += [(label, question(problem)) for problem in task.problems("test")]
    return found


def set_classifier(folder: Path, expert: Path) -> None:
    """Makes an expert the bank's classification expert."""
    Expert.load(expert)
    with replacing(folder / f"{CLASSIFIER}.safetensors") as temporary:
        shutil.copyfile(expert, temporary)


def add_prompts(folder: Path, label: str, task: Task) -> None:
    """Keeps prompts of a task for a domain, or for what the base answers ("others"), in place of those there are."""
    if label != OTHERS and label not in _domains(folder):
        raise ValueError(f"name: expected {OTHERS!r} or one of {', '.join(_domains(folder))}, got {label!r}")
    _write_prompts(folder / "prompts" / label, label, _prompts_of(task))


def _domains(folder: Path) -> dict[str, str]:
    return {status.domain.name: status.domain.description for status in bank_status(folder)}


def _write_domains(folder: Path, domains: Mapping[str, str]) -> None:
    as_domains(domains)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "domains": dict(domains)}
    write_text(folder / "domains.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _prompts_of(task: Task) -> dict[Split, Sequence[Problem]]:
    found: dict[Split, Sequence[Problem]] = {split: task.problems(split)[:size] for split, size in SIZES.items()}
    if empty := [split for split, problems in found.items() if not problems]:
        raise ValueError(f"task: expected prompts in each split, got none for {', '.join(empty)}")
    return found


def _write_prompts(folder: Path, label: str, prompts: Mapping[Split, Sequence[Problem]]) -> None:
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    with atomic_directory(new) as temporary:
        for split, problems in prompts.items():
            lines = [json.dumps({"prompt": question(p), "answer": label}, ensure_ascii=False) for p in problems]
            write_text(temporary / f"{split}.jsonl", "\n".join(lines) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _counts(folder: Path, label: str) -> dict[Split, int]:
    counts: dict[Split, int] = {}
    for split in SIZES:
        path = folder / "prompts" / label / f"{split}.jsonl"
        try:
            counts[split] = sum(bool(line.strip()) for line in path.read_text().splitlines()) if path.is_file() else 0
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: expected UTF-8, got other bytes") from error
    return counts
