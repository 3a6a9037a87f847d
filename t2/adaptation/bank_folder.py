"""A bank as a folder: experts, descriptions of their domains, and a classification expert.

    domains.json              {"format": "t2-bank-folder", "format_version": "1", "domains": {NAME: DESCRIPTION, ...}}
    NAME.safetensors          the expert of each domain (`Expert.save`)
    classifier.safetensors    the classification expert, if there is one

A description is one line on the domain's questions, which goes into the adaptation prompt. Other keys of domains.json
and other files (a model card, curves) are ignored.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2.experts.expert import Expert
from t2.model.svf_model import SVFModel
from t2.tasks.classify import Domain, Domains, as_domains
from t2.weights.files import FileFormatError, atomic_directory, check_regular, file_errors, parse_json
from t2kernels.files import strict_json, write_text

SHIPPED = Path(__file__).parent.parent / "banks"
"""Packaged banks, one folder per model."""
FORMAT, FORMAT_VERSION = "t2-bank-folder", "1"
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class BankFolder:
    """Contents of a bank folder: domains in order, their experts by name, and the classification expert, if any."""

    domains: tuple[Domain, ...]
    experts: Mapping[str, Expert]
    classifier: Expert | None = None

    def add_to(self, svf: SVFModel) -> None:
        """Add all experts to a model under their names, the classification expert as "classifier"."""
        for domain in self.domains:
            svf.add_expert(domain.name, self.experts[domain.name])
        if self.classifier is not None:
            svf.add_expert(CLASSIFIER, self.classifier)


def bank_path(path: str | Path) -> Path:
    """The folder itself, or that of the packaged bank with this name."""
    folder = Path(path).expanduser()
    shipped = SHIPPED / str(path)
    return shipped if not folder.exists() and (shipped / "domains.json").is_file() else folder


def load_bank_folder(path: str | Path) -> BankFolder:
    """Read a bank folder, or a packaged bank by its name.

    A warning names domains that the classification expert was not trained on.

    Raises:
        FileNotFoundError: the folder, its domains.json, or an expert's file is missing.
        FileFormatError: a file is damaged, or the experts have different bases.
    """
    folder = bank_path(path)
    described = folder / "domains.json"
    if not described.exists():
        raise FileNotFoundError(f"bank: expected a folder with domains.json, got {folder}")
    check_regular(described, "bank")
    with file_errors(f"{described} does not describe a bank"):
        content = strict_json(described.read_bytes())
        found = content["format"], content["format_version"]
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {found!r:.80}, expected {(FORMAT, FORMAT_VERSION)}")
        if not isinstance(content["domains"], dict):
            raise ValueError("domains: expected descriptions by name")
        domains = as_domains(content["domains"])
        for domain in domains:
            check_file_name(domain.name)
    experts = {domain.name: Expert.load(folder / f"{domain.name}.safetensors") for domain in domains}
    classifier = folder / f"{CLASSIFIER}.safetensors"
    bank = BankFolder(domains, experts, Expert.load(classifier) if classifier.exists() else None)
    return _checked(bank, str(folder), str(classifier))


def save_bank_folder(
    path: str | Path, domains: Domains, experts: Mapping[str, Expert], classifier: Expert | None = None
) -> None:
    """Write a bank folder atomically.

    Raises:
        ValueError: a domain has no expert, or an expert no domain; a name is no file name; bases differ.
        OSError: there is something at `path` already, or it cannot be written.
    """
    path, domains = Path(path), as_domains(domains)
    if {domain.name for domain in domains} != set(experts):
        raise ValueError(f"experts: expected one for each of {[d.name for d in domains]}, got {list(experts)}")
    for domain in domains:
        check_file_name(domain.name)
    _checked(BankFolder(domains, experts, classifier), "experts")
    if path.exists():
        raise FileExistsError(f"path: expected a new folder, {path} exists")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "domains": {domain.name: domain.description for domain in domains},
    }
    with atomic_directory(path) as temporary:
        write_text(temporary / "domains.json", json.dumps(description, indent=1) + "\n")
        for name, expert in (*experts.items(), *([(CLASSIFIER, classifier)] if classifier else [])):
            expert.save(temporary / f"{name}.safetensors")


def named_experts(pairs: Sequence[str], descriptions: Mapping[str, str] | None = None) -> BankFolder:
    """The bank of files given as NAME=FILE; "classifier" is the classification expert.

    Args:
        pairs: at least one beside the classifier.
        descriptions: of domains, by name; default the "description" of an expert's metadata, or none.

    Raises:
        ValueError: a pair is not NAME=FILE, or a name comes twice. FileNotFoundError, FileFormatError: a file cannot
            be read.
    """
    experts: dict[str, Expert] = {}
    files: dict[str, str] = {}
    for pair in pairs:
        name, equals, files[name] = pair.partition("=")
        if not (name and equals and files[name]) or name in experts:
            raise ValueError(f"candidates: expected NAME=FILE, each name once, got {pair!r}")
        experts[name] = Expert.load(Path(files[name]).expanduser())
    classifier = experts.pop(CLASSIFIER, None)
    given = dict(descriptions or {})
    if unknown := set(given) - set(experts):
        raise ValueError(f"domains: expected names of experts ({', '.join(experts)}), got {', '.join(sorted(unknown))}")
    domains = as_domains({name: given.get(name, e.metadata.get("description", "")) for name, e in experts.items()})
    return _checked(BankFolder(domains, experts, classifier), "experts", files.get(CLASSIFIER, CLASSIFIER))


def trained_domains(classifier: Expert, where: str = CLASSIFIER) -> tuple[str, ...] | None:
    """Domains that a classification expert was trained on, by its metadata; None if the metadata lacks them.

    `t2 train` writes them as "domains", a JSON list of names; older files have them in the "options" of the task.
    `where` names the file in errors.

    Raises:
        FileFormatError: the metadata is not what `t2 train` writes.
    """
    about = classifier.metadata
    if "domains" in about:
        names = parse_json(about["domains"], f"{where}: domains")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FileFormatError(f"{where}: domains: expected a list of names, got {names!r:.80}")
        return tuple(names)
    if about.get("task") != "classify" or "options" not in about:
        return None
    with file_errors(f"{where}: options"):
        options = strict_json(strict_json(about["options"])["task_options"])
        return tuple(map(str, options["domains"])) if "domains" in options else None


def check_file_name(name: str) -> None:
    """ValueError unless a domain's expert can have this name."""
    if name == CLASSIFIER or name.startswith(".") or Path(name).name != name or "\0" in name:
        raise ValueError(f"domains: expected names that are file names, other than {CLASSIFIER!r}, got {name!r}")


def _checked(bank: BankFolder, where: str, classifier_file: str = CLASSIFIER) -> BankFolder:
    layout = next(iter(bank.experts.values())).layout
    for name, expert in (*bank.experts.items(), *([(CLASSIFIER, bank.classifier)] if bank.classifier else [])):
        try:
            layout.check_same(expert.layout, name)
        except ValueError as error:
            raise FileFormatError(f"{where}: expected experts of one base, {error}") from error
    known = None if bank.classifier is None else trained_domains(bank.classifier, classifier_file)
    if known is not None and (unknown := [domain.name for domain in bank.domains if domain.name not in known]):
        warnings.warn(
            f"{where}: the classification expert {classifier_file} was trained on {', '.join(known)}, not on "
            f"{', '.join(unknown)}, which it will choose at random or never; train it again, or adapt by the prompt",
            stacklevel=3,
        )
    return bank
