"""The `t2 bank` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from t2.cli.options import OPTIONAL, Model, TaskOptions

if TYPE_CHECKING:
    from rich.console import Console

Folder = Annotated[Positional[Path], arg(metavar="FOLDER", help="The bank's folder.")]


@dataclass(frozen=True)
class Init:
    """Make a bank without domains, or a copy of another one."""

    folder: Folder
    copy_of: Annotated[Path | None, arg(metavar="BANK", help_behavior_hint=OPTIONAL)] = None
    """Bank to copy: a folder, or the name of one that ships."""


@dataclass(frozen=True)
class Add:
    """Add a domain with its expert, a description, and prompts of its task."""

    folder: Folder
    name: str
    """Name of the domain, its expert and its label."""
    expert: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None
    """Expert file. Without one the prompts of a domain of the bank, or of "others", are replaced."""
    description: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=OPTIONAL)] = None
    """One line on the domain's questions; default that in the expert's file."""
    task: Annotated[str | None, arg(metavar="TASK", help_behavior_hint=OPTIONAL)] = None
    """Task that gives prompts of the domain, such as jsonl:FILE; the classification expert is trained on them."""
    task_options: TaskOptions = "{}"
    replace: bool = False
    """Take the place of a domain of this name."""


@dataclass(frozen=True)
class Show:
    """List the domains: description, prompts, and whether the classification expert knows them."""

    folder: Folder


@dataclass(frozen=True)
class Remove:
    """Remove a domain with its expert and prompts."""

    folder: Folder
    name: str
    """Name of the domain."""


@dataclass(frozen=True)
class Check:
    """Read every file; exit code 1 where automatic choice would leave a domain out."""

    folder: Folder


@dataclass(frozen=True)
class TrainClassifier:
    """Train a classification expert for all domains on the prompts that the bank keeps, and put it into the bank."""

    model: Model
    folder: Folder
    output: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/classifier")
    """Folder of the training run."""
    steps: int = 64
    """Steps of training."""
    learning_rate: float = 4e-3
    """Adam's learning rate."""
    resume: bool = False
    """Continue the run in the output folder from its checkpoint."""


Action = (
    Annotated[Init, subcommand("init")]
    | Annotated[Add, subcommand("add")]
    | Annotated[Show, subcommand("list")]
    | Annotated[Remove, subcommand("remove")]
    | Annotated[Check, subcommand("check")]
    | Annotated[TrainClassifier, subcommand("train-classifier")]
)


def run(action: OmitSubcommandPrefixes[OmitArgPrefixes[Action]]) -> int:
    """Make and change banks of experts: init, add, list, remove, check, train-classifier.

    Example: t2 bank add bank --name mine --expert best.safetensors --description "my questions" --task jsonl:mine.jsonl
    """
    from rich.console import Console

    from t2.adaptation import bank_command, bank_edit
    from t2.tasks import get, options_of

    console = Console()
    if isinstance(action, TrainClassifier):
        return _train(action, console)
    if isinstance(action, Init):
        bank_edit.init_bank(action.folder, action.copy_of)
    elif isinstance(action, Add):
        task = None if action.task is None else get(action.task, **options_of(action.task_options))
        if action.expert is not None:
            bank_edit.add_domain(
                action.folder,
                action.name,
                action.expert,
                description=action.description,
                task=task,
                replace=action.replace,
            )
        elif task is not None and action.description is None:
            bank_edit.add_prompts(action.folder, action.name, task)
        else:
            raise ValueError("expert: expected the file of an expert, or --task alone for new prompts of a domain")
    elif isinstance(action, Remove):
        bank_edit.remove_domain(action.folder, action.name)
    elif isinstance(action, Check):
        return 0 if bank_command.check(action.folder, console) else 1
    bank_command.show(action.folder, bank_edit.bank_status(action.folder), console)
    return 0


def _train(action: TrainClassifier, console: Console) -> int:
    from t2.adaptation import bank_command, bank_edit
    from t2.adaptation.bank_folder import CLASSIFIER
    from t2.experts.expert import Expert
    from t2.training import TrainOptions, train

    task, task_options = bank_edit.classifier_task(action.folder)
    options = TrainOptions(
        task=task,
        task_options=task_options,
        output=action.output,
        resume=action.resume,
        objective="next-token",
        steps=action.steps,
        prompts_per_step=16,
        samples_per_prompt=8,
        learning_rate=action.learning_rate,
        decay=True,
        validate_every=max(1, action.steps // 8),
        patience=4,
        factor_dtype="bfloat16",
        bf16_products=True,
        trackers=(),
    )
    before = action.folder / f"{CLASSIFIER}.safetensors"
    classifiers = {"before": Expert.load(before)} if before.exists() else {}
    result = train(action.model, options, console=console)
    if not result.finished:
        return 130
    bank_edit.set_classifier(action.folder, result.expert)
    classifiers["now"] = Expert.load(result.expert)
    bank_command.show_accuracy(bank_command.dispatch_accuracy(action.model, classifiers, action.folder), console)
    bank_command.show(action.folder, bank_edit.bank_status(action.folder), console)
    return 0
