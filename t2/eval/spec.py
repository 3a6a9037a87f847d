"""What `t2 eval` measures, as a JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from t2.adaptation.options import Calibration, FewShotOptions
from t2.adaptation.strategies import PASS_ONE
from t2.tasks import Split
from t2.tasks.classify import BASE, RESERVED
from t2.weights.files import FileFormatError, check_regular, file_errors
from t2kernels.files import strict_json

MOST = (1 << 31) - 1
"""Largest number in a plan."""
INCUMBENTS = (BASE, *PASS_ONE)


@dataclass(frozen=True)
class TaskSpec:
    """A task and how its problems are used."""

    task: str
    """A name that `t2.tasks.get` knows."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the task."""
    problems: int | None = None
    """Test problems, in place of the plan's."""
    max_new_tokens: int | None = None
    """Longest answer; the task's own room if none is given."""
    few_shot_from: Split = "train"
    """Split that few-shot problems are drawn from. "test": those behind the ones that are judged, for a task that has
    no other split."""


@dataclass(frozen=True)
class EvalSpec:
    """The keys of the file; all but `seen` may be left out. Paths are those of the command line."""

    seen: Mapping[str, TaskSpec]
    """Tasks by the name of the expert of the bank that is for them."""
    unseen: Mapping[str, TaskSpec] = field(default_factory=dict)
    """Tasks that no expert was trained on, by any other name."""
    problems: int = 200
    """Test problems of a task."""
    lora: str | None = None
    """Folder of a LoRA adapter (PEFT, safetensors) that was trained on all domains."""
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further experts, of other modules or another objective: {label: {domain: file}}."""

    few_shot: tuple[int, ...] = (10,)
    """Few-shot problems of the columns of table 2."""
    few_shot_per_layer: bool = False
    """Whether table 2 also has columns with weights for each layer."""
    few_shot_sizes: tuple[int, ...] = (3, 5, 10, 20)
    """Few-shot problems of the ablation."""
    few_shot_seeds: tuple[int, ...] = (0,)
    """Of the problems drawn and the search: all in the ablation, the first in table 2."""
    few_shot_tasks: tuple[str, ...] | None = None
    """Tasks of the ablation; those of `unseen` if none are given."""
    incumbents: tuple[str, ...] = ("base",)
    """What stays unless a mix is better by the margin of `search`: "base", or what "prompt" or "classifier" give the
    most few-shot problems to. Each has columns of its own, from the same searches."""
    search: FewShotOptions = field(default_factory=FewShotOptions)
    """Options of the search, but for seed, granularity and token_budget."""

    calibration: Calibration = "contextual"
    """Of the prompt strategy in table 2; "batch" is not for tasks one by one."""
    dispatch_prompts: int = 300
    """Prompts of all seen tasks together that the dispatcher is judged on, and as many of the unseen ones."""
    times_requests: int = 32
    """Requests of a batch whose passes are timed."""
    times_rounds: int = 3
    """Rounds in which the paths take turns."""
    times_tasks: tuple[str, ...] | None = None
    """Tasks that have a batch of their own, beside the mixed one of the seen tasks; all if none are given."""

    @property
    def tasks(self) -> dict[str, TaskSpec]:
        """Seen ones, then unseen ones."""
        return {**self.seen, **self.unseen}

    @property
    def ablated(self) -> tuple[str, ...]:
        """Tasks of the few-shot ablation."""
        return tuple(self.unseen) if self.few_shot_tasks is None else self.few_shot_tasks

    @property
    def timed(self) -> tuple[str, ...]:
        """Tasks with a timed batch of their own."""
        return tuple(self.tasks) if self.times_tasks is None else self.times_tasks


def load_spec(path: str | Path) -> EvalSpec:
    """Reads a plan.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is not JSON or no plan; the message names the file and the key.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"plan: expected a JSON file, {path} does not exist")
    check_regular(path, "plan")
    try:
        content = strict_json(path.read_bytes())
    except ValueError as error:
        raise FileFormatError(f"plan: expected JSON, got {path}: {error}") from error
    with file_errors(f"plan {path}"):
        return parse_spec(content)


def parse_spec(content: Any) -> EvalSpec:
    """A plan from what its JSON holds; ValueError names the key that is wrong."""
    given = dict(_object("plan", content, EvalSpec))
    for name in ("seen", "unseen"):
        if name in given:
            tasks = _object(name, given[name])
            given[name] = {label: _task(f"{name}.{label}", task) for label, task in tasks.items()}
    if "variants" in given:
        given["variants"] = {
            label: _texts(f"variants.{label}", experts)
            for label, experts in _object("variants", given["variants"]).items()
        }
    for name in ("few_shot", "few_shot_sizes", "few_shot_seeds"):
        if name in given:
            given[name] = _integers(name, given[name], 0 if name == "few_shot_seeds" else 1)
    for name in ("problems", "dispatch_prompts", "times_requests", "times_rounds"):
        if name in given:
            _integer(name, given[name])
    for name in ("few_shot_tasks", "times_tasks"):
        if (named := given.get(name)) is not None:
            _check(name, isinstance(named, list) and all(isinstance(x, str) for x in named), "a list of tasks", named)
            given[name] = tuple(named)
    _check(
        "few_shot_per_layer",
        isinstance(given.get("few_shot_per_layer", False), bool),
        "true or false",
        given.get("few_shot_per_layer"),
    )
    _check("lora", isinstance(given.get("lora", ""), str | None), "a folder", given.get("lora"))
    calibration = given.get("calibration", "contextual")
    _check("calibration", calibration in ("none", "contextual"), "none or contextual", calibration)
    if "incumbents" in given:
        named = given["incumbents"]
        known = isinstance(named, list) and bool(named) and set(map(str, named)) <= set(INCUMBENTS)
        _check("incumbents", known and len(set(named)) == len(named), f"some of {', '.join(INCUMBENTS)}", named)
        given["incumbents"] = tuple(named)
    given["search"] = _search(given.get("search", {}))
    plan = EvalSpec(**given)
    _check("search.margin", plan.incumbents == (BASE,) or plan.search.margin > 0, "one above 0 for incumbents", 0)
    _check_names(plan)
    return plan


def _check_names(plan: EvalSpec) -> None:
    _check("seen", bool(plan.seen), "at least one task", "none")
    both = set(plan.seen) & set(plan.unseen)
    _check("unseen", not both, "names that no seen task has", sorted(both))
    reserved = set(plan.tasks) & set(RESERVED)
    _check("seen, unseen", not reserved, f"names other than {' and '.join(RESERVED)}", sorted(reserved))
    for name, labels in (("few_shot_tasks", plan.ablated), ("times_tasks", plan.timed)):
        unknown = set(labels) - set(plan.tasks)
        _check(name, not unknown, f"tasks of the plan ({', '.join(plan.tasks)})", sorted(unknown))
    for label, experts in plan.variants.items():
        unknown = set(experts) - set(plan.seen)
        _check(f"variants.{label}", not unknown, f"seen tasks ({', '.join(plan.seen)})", sorted(unknown))


def _task(name: str, content: Any) -> TaskSpec:
    given = dict(_object(name, content, TaskSpec))
    _check(f"{name}.task", isinstance(given["task"], str) and bool(given["task"]), "the name of a task", given["task"])
    _object(f"{name}.options", given.get("options", {}))
    for key in ("problems", "max_new_tokens"):
        if given.get(key) is not None:
            _integer(f"{name}.{key}", given[key])
    split = given.get("few_shot_from", "train")
    _check(f"{name}.few_shot_from", split in ("train", "validation", "test"), "train, validation or test", split)
    return TaskSpec(**given)


def _search(content: Any) -> FewShotOptions:
    given, defaults = _object("search", content, FewShotOptions), FewShotOptions()
    for name, value in given.items():
        _check(
            f"search.{name}",
            name not in ("seed", "granularity", "token_budget"),
            "none here: few_shot_seeds, few_shot_per_layer and the command line have it",
            value,
        )
        kind = type(getattr(defaults, name))
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        fits = fits and (isinstance(value, str) or abs(value) <= MOST)
        _check(f"search.{name}", fits, f"a value like {getattr(defaults, name)!r}", value)
    try:
        return FewShotOptions(**given)
    except ValueError as error:
        raise ValueError(f"search.{error}") from error


def _object(name: str, content: Any, of: type | None = None) -> Mapping[str, Any]:
    """The content, if it is an object with the keys of the dataclass `of`, the required ones among them."""
    _check(name, isinstance(content, dict), "an object", content)
    if of is not None:
        known = [each.name for each in fields(of)]
        for key in content:
            _check(name, key in known, f"keys among {', '.join(known)}", key)
        for each in fields(of):
            required = each.default is MISSING and each.default_factory is MISSING
            _check(name, not required or each.name in content, f"the key {each.name}", list(content))
    return cast(Mapping[str, Any], content)


def _texts(name: str, content: Any) -> Mapping[str, str]:
    found = _object(name, content)
    for key, value in found.items():
        _check(f"{name}.{key}", isinstance(value, str), "a file", value)
    return found


def _integers(name: str, content: Any, least: int) -> tuple[int, ...]:
    _check(name, isinstance(content, list) and bool(content), "a list of integers", content)
    for value in cast(Sequence[Any], content):
        _integer(name, value, least)
    _check(name, len(set(content)) == len(content), "different integers", content)
    return tuple(cast(Iterable[int], content))


def _integer(name: str, value: Any, least: int = 1) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST
    _check(name, fits, f"integers >= {least}", value)


def _check(name: str, holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r:.200}")
