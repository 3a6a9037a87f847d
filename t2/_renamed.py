"""Import paths of version 0.1, which keep working for one release with a DeprecationWarning."""

from __future__ import annotations

import importlib
import itertools
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {
    "t2.adaptation.decoding": ("t2.generation.decode",),
    "t2.adaptation.fewshot": ("t2.adaptation.few_shot",),
    "t2.adaptation.folder": ("t2.adaptation.bank_folder",),
    "t2.attention": ("t2.model.attention", "t2.model.kv_cache"),
    "t2.comparison": ("t2.generation.evaluate",),
    "t2.decoding": ("t2.generation.decode",),
    "t2.demo_bank": ("t2.demo.bank",),
    "t2.evaluate": ("t2.eval",),
    "t2.evaluate.cells": ("t2.eval.result_cache",),
    "t2.evaluate.command": ("t2.eval.command",),
    "t2.evaluate.lora": ("t2.eval.lora_adapter",),
    "t2.evaluate.measuring": ("t2.eval.runner",),
    "t2.evaluate.plan": ("t2.eval.spec",),
    "t2.evaluate.plots": ("t2.eval.plots",),
    "t2.evaluate.sections": ("t2.eval.sections",),
    "t2.evaluate.tables": ("t2.eval.report",),
    "t2.evaluation": (
        "t2.generation.evaluate",
        "t2.tasks.statistics",
        "t2.generation.prompts",
        "t2.generation.batching",
    ),
    "t2.footprint": ("t2.weights.estimate",),
    "t2.footprint_tables": ("t2.cli.estimate_tables",),
    "t2.layers": ("t2.model.layers",),
    "t2.layout": ("t2.experts.layout",),
    "t2.loading": ("t2.weights.loading",),
    "t2.merged_check": ("t2.demo.merged_check",),
    "t2.peers": ("t2.demo.baselines",),
    "t2.planning": ("t2.model.serving_plan",),
    "t2.registry": ("t2.experts.registry",),
    "t2.routing": ("t2.model.routing", "t2.experts.slots"),
    "t2.shards": ("t2.weights.shards",),
    "t2.sizes": ("t2.weights.memory_model", "t2.weights.step_sizes"),
    "t2.storage": ("t2.weights.files",),
    "t2.streaming": ("t2.weights.streaming", "t2.model.load"),
    "t2.svd": ("t2.weights.factor_cache",),
    "t2.targets": ("t2.weights.targets",),
    "t2.tasks.official": ("t2.tasks.dataset_task",),
    "t2.throughput": ("t2.demo.throughput", "t2.weights.machine"),
    "t2.training.curves": ("t2.training.metrics",),
    "t2.training.guard": ("t2.training.alarms",),
    "t2.training.reinforce": ("t2.training.loss",),
    "t2.transfer": ("t2.experts.transfer", "t2.eval.transfer"),
    "t2.verify": ("t2.model.verify", "t2.model.probe"),
    "t2.vision": ("t2.generation.images", "t2.generation.prompts"),
}
"""Where the names of an old module are now: the modules that are searched, in this order."""

NAMES: dict[str, str] = {
    "Adapter": "LoraAdapter",
    "Cells": "ResultCache",
    "Found": "SearchProgress",
    "Guard": "AlarmMonitor",
    "Measuring": "EvalRunner",
    "Missing": "MissingResult",
    "Plan": "EvalSpec",
    "TaskPlan": "TaskSpec",
    "Footprint": "ModelEstimate",
    "Work": "StepSizes",
    "footprint": "estimate_model",
    "ServedExperts": "ExpertRegistry",
    "load_plan": "load_spec",
    "parse_plan": "parse_spec",
}
"""New names of classes and functions that the modules above had under another one."""


class _Renamed(ModuleType):
    """An old module: looks its names up in the new ones, and warns."""

    def __getattr__(self, name: str) -> Any:
        homes = MODULES[self.__name__]
        if not name.startswith("__"):
            for home, now in itertools.product(homes, dict.fromkeys((NAMES.get(name, name), name))):
                found = getattr(importlib.import_module(home), now, None)
                if found is not None:
                    warnings.warn(
                        f"{self.__name__}.{name} is now {home}.{now}; the old path goes with the next release",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return found
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}; its names are in {' and '.join(homes)}"
        )


class _Finder:
    """Finds the old modules (`sys.meta_path`)."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder, is_package=True) if name in MODULES else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _Renamed(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None: ...


def install() -> None:
    """Makes the old paths importable, behind all that exists."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
