"""The spec of `t2 eval`: a JSON file with the tasks, columns and sizes to evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from t2.adaptation.options import FewShotOptions
from t2.adaptation.strategies import PASS_ONE
from t2.tasks.base import Split
from t2.tasks.classify import BASE, RESERVED
from t2.weights.files import FileFormatError, check_regular, file_errors
from t2kernels.files import strict_json

MOST = (1 << 31) - 1
"""Largest number in a spec."""
INCUMBENTS = (BASE, *PASS_ONE)
ELSEWHERE = {"seed": "few_shot_seeds", "granularity": "few_shot_per_layer", "token_budget": "--token-budget"}
"""Options of the search that a spec does not take, and what sets them."""
T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) != len(values):
        raise ValueError(f"expected distinct values, got {list(values)!r:.200}")
    return values


def _incumbents(values: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := set(values) - set(INCUMBENTS):
        raise ValueError(f"expected some of {', '.join(INCUMBENTS)}, got {sorted(unknown)}")
    return values


def _search(given: Any) -> Any:
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in ELSEWHERE:
            raise ValueError(f"{name}: expected none here ({ELSEWHERE[name]} sets it), got {value!r:.200}")
        if isinstance(value, int | float) and abs(value) > MOST:
            raise ValueError(f"{name}: expected a number up to {MOST}, got {value!r:.200}")
    return given


Count = Annotated[int, Field(ge=1, le=MOST)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=MOST)], ...], Field(min_length=1), AfterValidator(_distinct)]
Incumbents = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_distinct), AfterValidator(_incumbents)]
STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=STRICT)
class TaskSpec:
    """One task and the use of its examples."""

    task: Annotated[str, Field(min_length=1)]
    """Name of the task, as `t2.tasks.get` takes it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task."""
    problems: Count | None = None
    """Number of test examples; the default is the spec's."""
    max_new_tokens: Count | None = None
    """Maximum length of a completion, in tokens; the default is the task's."""
    few_shot_from: Split = "train"
    """Split of the few-shot examples. "test" takes those behind the test examples, for a task without other splits."""


@dataclass(frozen=True, config=STRICT)
class EvalSpec:
    """The keys of the file; only `seen` is required. Paths are relative to the working directory."""

    seen: Annotated[Mapping[str, TaskSpec], Field(min_length=1)]
    """Tasks that experts were trained on, by the names of these experts in the bank."""
    unseen: Mapping[str, TaskSpec] = field(default_factory=dict)
    """Tasks that no expert was trained on, by names of your choice."""
    problems: Count = 200
    """Number of test examples of a task."""
    lora: str | None = None
    """Folder of a LoRA adapter (PEFT, safetensors) that was trained on all domains."""
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further experts, of other modules or another objective: {label: {domain: file}}."""

    few_shot: Counts = (10,)
    """Numbers of few-shot examples, one column of table 2 each."""
    few_shot_per_layer: bool = False
    """Add columns to table 2 with one set of weights per layer."""
    few_shot_sizes: Counts = (3, 5, 10, 20)
    """Numbers of few-shot examples in the ablation."""
    few_shot_seeds: Seeds = (0,)
    """Seeds of the few-shot examples and the search: all in the ablation, the first in table 2."""
    few_shot_tasks: tuple[str, ...] | None = None
    """Tasks of the ablation; the default is `unseen`."""
    incumbents: Incumbents = (BASE,)
    """Experts kept unless the best mix wins by `search.margin`: "base", or the majority choice of "prompt" or
    "classifier" on the few-shot examples. Each has columns of its own, from the same searches."""
    search: Annotated[FewShotOptions, BeforeValidator(_search)] = field(default_factory=FewShotOptions)
    """Options of the search, except seed, granularity and token_budget."""

    calibration: Literal["none", "contextual"] = "contextual"
    """Calibration of the prompt strategy in table 2."""
    dispatch_prompts: Count = 300
    """Number of prompts that the dispatcher is evaluated on: of all seen tasks together, and of all unseen ones."""
    times_requests: Count = 32
    """Requests of a timed batch."""
    times_rounds: Count = 3
    """Number of timed rounds, in which the paths take turns."""
    times_tasks: tuple[str, ...] | None = None
    """Tasks with a timed batch of their own, beside the mixed batch of the seen tasks; the default is all tasks."""

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Seen tasks, then unseen ones."""
        return {**self.seen, **self.unseen}

    @property
    def ablated(self) -> tuple[str, ...]:
        """Tasks of the few-shot ablation."""
        return tuple(self.unseen) if self.few_shot_tasks is None else self.few_shot_tasks

    @property
    def timed(self) -> tuple[str, ...]:
        """Tasks with a timed batch of their own."""
        return tuple(self.tasks) if self.times_tasks is None else self.times_tasks

    @model_validator(mode="after")
    def _check_names(self) -> EvalSpec:
        def check(name: str, wrong: set[str], expected: str) -> None:
            if wrong:
                raise ValueError(f"{name}: expected {expected}, got {sorted(wrong)}")

        check("unseen", set(self.seen) & set(self.unseen), "names that no seen task has")
        check("seen, unseen", set(self.tasks) & set(RESERVED), f"names other than {' and '.join(RESERVED)}")
        for name, labels in (("few_shot_tasks", self.ablated), ("times_tasks", self.timed)):
            check(name, set(labels) - set(self.tasks), f"tasks of the spec ({', '.join(self.tasks)})")
        for label, experts in self.variants.items():
            check(f"variants.{label}", set(experts) - set(self.seen), f"seen tasks ({', '.join(self.seen)})")
        if self.incumbents != (BASE,) and not self.search.margin:
            raise ValueError("search.margin: expected a number above 0 for incumbents, got 0")
        return self


_ADAPTER = TypeAdapter(EvalSpec)


def load_spec(path: str | Path) -> EvalSpec:
    """Read a spec.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is not JSON or no spec; the message names the file and the key.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"spec: expected a JSON file, {path} does not exist")
    check_regular(path, "spec")
    try:
        content = strict_json(path.read_bytes())
    except ValueError as error:
        raise FileFormatError(f"spec: expected JSON, got {path}: {error}") from error
    with file_errors(f"spec {path}"):
        return parse_spec(content)


def parse_spec(content: Any) -> EvalSpec:
    """The spec in the content of its JSON file; ValueError names each key that is wrong."""
    try:
        return _ADAPTER.validate_json(json.dumps(content))
    except ValidationError as error:
        raise ValueError("; ".join(_message(each) for each in error.errors()[:5])) from error


def _message(error: Mapping[str, Any]) -> str:
    """One error of pydantic as "key: expected X, got Y"."""
    kind, where = error["type"], [str(part) for part in error["loc"]]
    if kind in ("missing", "unexpected_keyword_argument"):
        *parents, key = where
        name = ".".join(parents) or "spec"
        if kind == "missing":
            return f"{name}: expected the key {key}, got none"
        of = {0: EvalSpec, 2: TaskSpec}.get(len(parents), FewShotOptions)
        return f"{name}: expected keys among {', '.join(each.name for each in fields(of))}, got {key!r}"
    if kind == "value_error":
        reason = str(error["ctx"]["error"])  # has "got" already, and the rest of the key unless it is this one
        return f"{'.'.join(where)}: {reason}" if reason.startswith("expected") else ".".join([*where, reason])
    reason = "expected at least one" if kind == "too_short" else error["msg"].replace("Input should be", "expected")
    return f"{'.'.join(where) or 'spec'}: {reason}, got {error['input']!r:.200}"
