"""The `t2 chat` command."""

from __future__ import annotations

from t2.cli.options import Bank, FactorDtype, Model


def run(
    model: Model,
    bank: Bank = None,
    expert: str = "base",
    factor_dtype: FactorDtype = "bfloat16",
    max_new_tokens: int = 512,
    max_tokens: int = 2048,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> int:
    """Talk to a model and its experts in the terminal.

    In the conversation /expert NAME goes on with another expert, a mix ("sums:0.7+logic:0.3") or auto, /experts lists
    them, /reset begins anew, and /quit or the end of the input ends it.

    Example: t2 chat smollm2-135m-instruct --bank smollm2-135m-instruct --expert auto

    Args:
        expert: Expert that answers first.
        max_new_tokens: Maximum length of an answer, in tokens.
        max_tokens: Maximum length of the conversation, in tokens.
        temperature: 0 takes the likeliest tokens.
        top_p: Share of the probability that tokens are drawn from.
        seed: Seed of the draws.
    """
    import torch
    from rich.console import Console

    from t2.generation.sampling import Sampling
    from t2.server.chat import chat
    from t2.server.opened import open_engine

    sampling = Sampling(temperature, top_p, seed)
    console, dtype = Console(), getattr(torch, factor_dtype)
    opened = open_engine(model, bank, dtype=dtype, news=console.print, max_rows=1, max_tokens=max_tokens)
    return chat(opened, expert, sampling, max_new_tokens, console)
