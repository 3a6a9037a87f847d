"""The `t2 estimate` command."""

from __future__ import annotations

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from t2.cli.options import OPTIONAL, ModelDtype, Targets, Unchecked
from t2.cli.options import target_modules as as_targets
from t2.weights.step_sizes import StepSizes


@dataclass(frozen=True)
class Given(Unchecked, StepSizes):
    """The sizes of the command line."""


def run(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    training_step: OmitArgPrefixes[Given] = Given(),  # frozen
    target_modules: Targets = ("all-linear",),
    model_dtype: ModelDtype = "float32",
    support: Annotated[int | None, arg(metavar="COMPONENTS", help_behavior_hint=OPTIONAL)] = None,
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
) -> int:
    """Estimate disk, memory, time, and the GPUs that can serve and train a model. No weights are read.

    Example: t2 estimate config.json --model-dtype bfloat16

    Args:
        model: A config.json, or a model: an alias, Hub id, local folder or GGUF file.
        training_step: Sizes of one training step.
        support: Components of each matrix, for the delta form: W beside the components that experts change.
        json: JSON file for the estimate, in bytes and seconds.
    """
    import torch
    from rich.console import Console

    from t2.cli.estimate_tables import show
    from t2.weights.estimate import estimate_model
    from t2.weights.memory_model import Rates
    from t2kernels.files import write_text

    sizes = StepSizes(**vars(training_step))
    estimate = estimate_model(
        model,
        as_targets(target_modules),
        dtype=getattr(torch, model_dtype),
        rates=Rates.measure(),
        support=support,
    )
    show(estimate, sizes, Console())
    if json is not None:
        write_text(json, json_format.dumps(estimate.to_dict(sizes), indent=1) + "\n")
    return 0
