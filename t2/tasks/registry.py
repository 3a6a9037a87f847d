"""Tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from t2.tasks.arc import ARC
from t2.tasks.base import Task
from t2.tasks.classify import Classification
from t2.tasks.gsm8k import GSM8K
from t2.tasks.humaneval import HumanEval
from t2.tasks.jsonl import JsonlTask
from t2.tasks.math import MATH
from t2.tasks.mbpp_pro import MBPPPro
from t2.tasks.mixture import Mixture
from t2.tasks.okvqa import OKVQA
from t2.tasks.reasoning_gym import ReasoningGym
from t2.tasks.textvqa import TextVQA
from t2kernels.files import strict_json


def classify(tasks: Mapping[str, Mapping[str, Any]], domains: Mapping[str, str], **options: Any) -> Classification:
    """`Classification` of tasks that are given by name, as `_named` takes them."""
    return Classification(_named(tasks), domains, **options)


def mixture(tasks: Mapping[str, Mapping[str, Any]], **options: Any) -> Mixture:
    """`Mixture` of tasks that are given by name, as `_named` takes them."""
    return Mixture(_named(tasks), **options)


def _named(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Task]:
    """Tasks from {label: {"name": ..., and the options of that task}}."""
    if not isinstance(tasks, Mapping) or not all(isinstance(t, Mapping) and "name" in t for t in tasks.values()):
        raise ValueError(f"tasks: expected {{label: {{'name': ..., options}}}}, got {tasks!r:.200}")
    return {label: get(**task) for label, task in tasks.items()}


NAMED: dict[str, Callable[..., Task]] = {
    "arc-challenge": partial(ARC, "Challenge"),
    "arc-easy": partial(ARC, "Easy"),
    "classify": classify,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "math": MATH,
    "mbpp-pro": MBPPPro,
    "mixture": mixture,
    "okvqa": OKVQA,
    "textvqa": TextVQA,
}
FAMILIES: dict[str, tuple[str, Callable[..., Task]]] = {
    "reasoning-gym": ("TASK", ReasoningGym),
    "jsonl": ("PATH", JsonlTask),
}


def names() -> list[str]:
    """Names that `get` takes; parts in capitals stand for a name or path."""
    return [*NAMED, *(f"{family}:{part}" for family, (part, _) in FAMILIES.items())]


def get(name: str, **options: Any) -> Task:
    """The task with this name: one of `names()`.

    Args:
        name: as "gsm8k", "reasoning-gym:chain_sum" or "jsonl:my.jsonl".
        options: the keyword arguments of its class.

    Raises:
        ValueError: there is no such task, or it has no such option, or takes another value for it; the message has
            what there is.
        ImportError: a package that the task needs is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"task: expected a name, got {type(name).__name__}")
    family, _, rest = name.partition(":")
    if name in NAMED:
        make = NAMED[name]
    elif family in FAMILIES and rest:
        make = partial(FAMILIES[family][1], rest)
    else:
        raise ValueError(f"task: expected one of {', '.join(names())}, got {name!r}")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters)
        raise ValueError(f"task {name}: {error}; its options are {known}") from error
    return make(**options)


def options_of(text: str) -> dict[str, Any]:
    """The options of a task that a command line gives as JSON.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        found = strict_json(text)
    except ValueError as error:
        raise ValueError(f"task_options: expected a JSON object, got {text!r:.200} ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"task_options: expected a JSON object, got {text!r:.200}")
    return dict(found)
