"""The `t2 demo` command."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import arg

from t2.cli.options import FactorDtype, ResultsFile


def run(
    model: Annotated[str, arg(metavar="MODEL")] = "smollm2-135m-instruct",
    factor_dtype: FactorDtype = "float32",
    new_tokens: int = 16,
    results: ResultsFile = None,
) -> int:
    """Serve 32 requests with 32 experts in one batch, check it against merged models, and time it beside the baselines.

    Example: t2 demo --factor-dtype bfloat16 --results demo.json

    Args:
        model: Base model: an alias, Hub id, local folder or GGUF file.
        new_tokens: Tokens generated per request when timing.
    """
    import torch

    from t2.demo.run import run_demo

    same = run_demo(model, dtype=getattr(torch, factor_dtype), new_tokens=new_tokens, results=results)
    return 0 if same or factor_dtype != "float32" else 1
