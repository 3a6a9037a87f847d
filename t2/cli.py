"""The `t2` command. Each subcommand's `--help` ends with an example."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from t2.sizes import Work
from t2.training.options import TrainOptions

Storage = Literal["float32", "bfloat16", "float16", "int8"]
ModelDtype = Annotated[
    Literal["float32", "bfloat16", "float16"], tyro.conf.arg(help="Of the model around the factors; targets too.")
]
Stream = Annotated[
    Literal["auto", "yes", "no"],
    tyro.conf.arg(help="Read one matrix at a time, never the dense model; auto: from local folders with shards."),
]
Targets = Annotated[
    tuple[str, ...],
    tyro.conf.arg(help="all-linear, attention, mlp, one regular expression, or several name suffixes"),
]

app = tyro.extras.SubcommandApp()


def _target_modules(targets: Sequence[str]) -> str | list[str]:
    return targets[0] if len(targets) == 1 else list(targets)


@app.command
def demo(
    model: str = "smollm2-135m-instruct",
    dtype: Storage = "float32",
    new_tokens: int = 16,
    results: Path | None = None,
) -> int:
    """One batch of 32 requests with 32 experts: answers, check against merged models, speed beside the peers.

    Example: t2 demo --dtype bfloat16 --results demo.json

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        dtype: Storage of the factors.
        new_tokens: Tokens generated per request where speed is measured.
        results: File for the figures as JSON.
    """
    from t2.demo import run_demo

    same = run_demo(model, dtype=getattr(torch, dtype), new_tokens=new_tokens, results=results)
    return 0 if same or dtype != "float32" else 1


@app.command
def decompose(
    model: tyro.conf.Positional[str],
    target_modules: Targets = ("all-linear",),
    cache_dir: Path | None = None,
    verify: bool = False,
    model_dtype: ModelDtype = "float32",
    stream: Stream = "auto",
    plan: bool = False,
    work: tyro.conf.OmitArgPrefixes[Work] = Work(),  # noqa: B008  # frozen
    json: Path | None = None,
) -> int:
    """Decompose every target matrix of a model into the cache. Continues where an interrupted run stopped.

    Example: t2 decompose smollm2-135m-instruct --target-modules q_proj v_proj
    With --plan, nothing is read but the config: t2 decompose config.json --plan --model-dtype bfloat16

    Args:
        model: Alias, Hub id, local folder or GGUF file; with --plan also a config.json.
        target_modules: Which layers.
        cache_dir: Folder of the cache.
        verify: Read every file back and check it against its weight.
        plan: Only show what the model would take: disk, memory, time, and the GPUs it could be served and trained on.
        work: Sizes of a training step, for the plan.
        json: File for the plan as JSON, in bytes and seconds.
    """
    if plan:
        return _show_plan(model, _target_modules(target_modules), getattr(torch, model_dtype), work, json)
    if json is not None:
        raise ValueError("json: expected none without --plan")
    from t2.streaming import target_weights
    from t2.svd import FactorCache, decompose_weights

    out, cache = Console(), FactorCache(cache_dir)
    weights = target_weights(model, _target_modules(target_modules), stream=stream, dtype=getattr(torch, model_dtype))
    done = decompose_weights(weights, cache)
    if verify:
        for entry in done.values():
            cache.verify(entry.key)
    shapes: dict[tuple[int, int], list[str]] = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        shapes.setdefault((rows, columns), []).append(name)
    table = Table("matrices", "out x in", "rank", "largest relative error", "new", "seconds each")
    for (rows, columns), names in shapes.items():
        entries = [done[name] for name in names]
        new = [entry.seconds for entry in entries if not entry.cached]
        table.add_row(
            str(len(names)),
            f"{rows} x {columns}",
            str(min(rows, columns)),
            f"{max(entry.error for entry in entries):.1e}",
            str(len(new)),
            f"{sum(new) / len(new):.3f}" if new else "",
        )
    out.print(table)
    total = sum(entry.rank for entry in done.values())
    checked = ", each read back and checked" if verify else ""
    out.print(f"{len(done)} matrices in {cache.directory}{checked}; an expert is {total:,} numbers")
    return 0


def _show_plan(model: str, targets: str | list[str], dtype: torch.dtype, work: Work, path: Path | None) -> int:
    from t2.footprint import footprint
    from t2.footprint_tables import show
    from t2.sizes import Rates
    from t2kernels.files import write_text

    plan = footprint(model, targets, dtype=dtype, rates=Rates.measure())
    show(plan, work, Console())
    if path is not None:
        write_text(path, dumps(plan.to_dict(work), indent=1) + "\n")
    return 0


@app.command
def generate(
    model: tyro.conf.Positional[str],
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(help="One or more requests, answered as one batch.")],
    expert: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(help="One expert file for all prompts, or one for each; none is the base."),
    ] = (),
    dtype: Storage = "float32",
    max_new_tokens: int = 64,
    sample: bool = False,
    model_dtype: ModelDtype = "float32",
    stream: Stream = "auto",
) -> int:
    """Answer prompts in one batch, each with its own expert.

    Example: t2 generate smollm2-135m-instruct --prompt "Add 2 and 3." "Hello!" --expert math.safetensors my.safetensors

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        dtype: Storage of the factors.
        max_new_tokens: Longest answer.
        sample: Sample instead of taking the likeliest token.
    """
    from t2.demo import chat_batch
    from t2.experts import Expert
    from t2.model import SVFConfig
    from t2.streaming import load_svf

    if len(expert) not in (0, 1, len(prompt)):
        raise ValueError(f"expert: expected none, one, or one for each of {len(prompt)} prompts, got {len(expert)}")
    config = SVFConfig(dtype=getattr(torch, dtype))
    svf, tokenizer = load_svf(model, config, stream=stream, dtype=getattr(torch, model_dtype))
    for path in set(expert):
        svf.add_expert(str(path), Expert.load(path))
    batch = chat_batch(tokenizer, list(prompt))
    experts = [str(path) for path in expert] * (len(prompt) if len(expert) == 1 else 1) or None
    out = svf.generate(**batch, experts=experts, max_new_tokens=max_new_tokens, do_sample=sample)
    for text, row in zip(prompt, out[:, batch["input_ids"].shape[1] :], strict=True):
        print(f"> {text}\n{str(tokenizer.decode(row, skip_special_tokens=True)).strip()}\n")
    return 0


@app.command
def train(model: tyro.conf.Positional[str], options: tyro.conf.OmitArgPrefixes[TrainOptions]) -> int:
    """Train an expert for a task with REINFORCE and a KL penalty. Ctrl-C saves; --resume goes on.

    Example: t2 train smollm2-135m-instruct --task reasoning-gym:chain_sum --output runs/sums

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        options: All knobs.
    """
    from t2.training.trainer import train as run

    out = Console()
    result = run(model, options)
    if not result.finished:
        out.print(f"Stopped at step {result.state.step}. The same command with --resume goes on from there.")
        return 0
    out.print(f"{result.expert}: step {result.state.best_step}, validation {result.state.best_score:.1%}")
    for name, found in (("base", result.base), ("trained", result.best)):
        if found is not None:
            low, high = found.interval
            out.print(f"{name}: {found.accuracy:.1%} of {len(found.scores)} test problems ({low:.1%} to {high:.1%})")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `t2` command. Errors in the input end it with one line and exit code 2."""
    try:
        code = app.cli(prog="t2", description="Transformer-squared on fused SVF kernels.", args=args)
    except (ValueError, TypeError, OSError) as error:
        print(f"t2: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


if __name__ == "__main__":
    main()
