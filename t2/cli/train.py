"""The `t2 train` command."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import OmitArgPrefixes

from t2.cli.options import Model, Unchecked
from t2.training.options import TrainOptions


@dataclass(frozen=True)
class Given(Unchecked, TrainOptions):
    """The options of the command line."""


def run(model: Model, training: OmitArgPrefixes[Given]) -> int:
    """Train an expert for a task with REINFORCE and a KL penalty. Ctrl-C saves the run; --resume continues it.

    Example: t2 train smollm2-135m-instruct --task reasoning-gym:chain_sum --output runs/sums

    Args:
        training: "Published" and "paper" mean arXiv 2501.06252.
    """
    import os

    from rich.console import Console

    from t2.training.trainer import train

    out = Console(quiet=os.environ.get("RANK", "0") != "0")  # one of torchrun's processes speaks for all
    result = train(model, TrainOptions(**vars(training)))
    if not result.finished:
        out.print(f"Stopped at step {result.state.step}. The same command with --resume continues from there.")
        return 0
    state = result.state
    if state.best_step:
        out.print(f"{result.expert}: step {state.best_step}, validation {state.best_score:.1%}")
    else:
        out.print(
            f"No step was better on validation than the start ({state.best_score:.1%}), which {result.expert} holds. "
            "docs/faq.md says what to check.",
            style="yellow",
        )
    for name, found in (("base", result.base), ("trained", result.best)):
        if found is not None:
            low, high = found.interval
            out.print(f"{name}: {found.accuracy:.1%} of {len(found.scores)} test examples ({low:.1%} to {high:.1%})")
    return 0
