"""Types and help texts of options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

OPTIONAL = "(optional)"
"""Text in place of a default that says nothing, such as an empty tuple."""

Model = Annotated[
    Positional[str], arg(metavar="MODEL", help="Base model: an alias, Hub id, local folder or GGUF file.")
]
FactorDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"], arg(help="Dtype in which the SVF factors are stored.")
]
ModelDtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    arg(help="Dtype of the base model; its weights are decomposed as they are in it."),
]
Stream = Annotated[
    Literal["auto", "yes", "no"],
    arg(help="Read one matrix at a time instead of the whole model; auto does so for local folders with shards."),
]
Targets = Annotated[
    tuple[str, ...],
    arg(
        metavar="NAME ...",
        help="Layers that get SVF: all-linear, attention, mlp, experts, one regular expression, or name suffixes.",
    ),
]
Prompts = Annotated[tuple[str, ...], arg(metavar="TEXT ...", help="Requests, answered as one batch.")]
Bank = Annotated[
    Path | None,
    arg(
        metavar="FOLDER",
        help="Bank of experts: a folder with domains.json (docs/adaptation.md).",
        help_behavior_hint=OPTIONAL,
    ),
]
Candidates = Annotated[
    tuple[str, ...],
    arg(
        metavar="NAME=FILE ...",
        help="Experts to choose among, instead of --bank; the name classifier marks the classification expert.",
        help_behavior_hint=OPTIONAL,
    ),
]
TaskOptions = Annotated[str, arg(metavar="JSON", help="Options of the task, as a JSON object.")]
ResultsFile = Annotated[
    Path | None, arg(metavar="FILE", help="JSON file for the figures.", help_behavior_hint=OPTIONAL)
]


class Unchecked:
    """Mixed into a dataclass of options: checks wait until a command has all of them, and then say it in one line."""

    def __post_init__(self) -> None:
        pass


def target_modules(targets: Sequence[str]) -> str | list[str]:
    """Targets as `SVFConfig` takes them: one name or expression, or a list of suffixes."""
    return targets[0] if len(targets) == 1 else list(targets)
