"""The `t2 bench` command."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from t2.cli.options import FactorDtype, ModelDtype, ResultsFile


def run(
    model: Annotated[Positional[str], arg(metavar="MODEL")] = "smollm2-135m-instruct",
    factor_dtype: FactorDtype = "bfloat16",
    model_dtype: ModelDtype = "bfloat16",
    new_tokens: int = 32,
    rounds: int = 2,
    results: ResultsFile = None,
) -> int:
    """Measure this machine's limits, one layer, and the model with an expert a request beside the dense ones.

    Prints a markdown table to paste. About a minute with the default model.

    Example: t2 bench smollm2-135m-instruct --factor-dtype int8

    Args:
        model: Base model: an alias, Hub id, local folder or GGUF file.
        new_tokens: Tokens generated per request.
        rounds: Turns of every path of the model.
    """
    import torch

    from t2.demo.bench import run_bench

    dtypes = {"dtype": getattr(torch, factor_dtype), "model_dtype": getattr(torch, model_dtype)}
    run_bench(model, **dtypes, new_tokens=new_tokens, rounds=rounds, results=results)
    return 0
