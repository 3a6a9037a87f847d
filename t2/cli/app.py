"""The `t2` command. Each subcommand's `--help` ends with an example."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from t2.adaptation.search import FewShotOptions
from t2.eval.sections import SECTIONS, Section
from t2.training.options import TrainOptions
from t2.weights.memory_model import Work
from t2kernels.files import write_text

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

Bank = Annotated[Path | None, tyro.conf.arg(help="Folder with experts and domains.json (docs/adaptation.md).")]
NamedExperts = Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar="NAME=FILE ...", help="Experts, in place of a bank; 'classifier' is the one of pass one."),
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
    from t2.demo.run import run_demo

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
    from t2.weights.factor_cache import FactorCache, decompose_weights
    from t2.weights.streaming import target_weights

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
    from t2.cli.estimate_tables import show
    from t2.weights.estimate import footprint
    from t2.weights.memory_model import Rates
    from t2kernels.files import write_text

    plan = footprint(model, targets, dtype=dtype, rates=Rates.measure())
    show(plan, work, Console())
    if path is not None:
        write_text(path, json.dumps(plan.to_dict(work), indent=1) + "\n")
    return 0


@app.command
def generate(
    model: tyro.conf.Positional[str],
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(help="One or more requests, answered as one batch.")],
    expert: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(help="One expert file for all prompts, or one for each; none is the base."),
    ] = (),
    adapt: Literal["prompt", "classifier"] | None = None,
    bank: Bank = None,
    experts: NamedExperts = (),
    domains: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME=TEXT ...", help="What the experts given by name are for, a line each."),
    ] = (),
    image: Annotated[
        tuple[Path, ...],
        tyro.conf.arg(help="One image file for all prompts, or one for each, for a model that reads images."),
    ] = (),
    dtype: Storage = "float32",
    max_new_tokens: int = 64,
    sample: bool = False,
    model_dtype: ModelDtype = "float32",
    stream: Stream = "auto",
) -> int:
    """Answer prompts in one batch, each with its own expert: given, or chosen by a first pass.

    Example: t2 generate smollm2-135m-instruct --prompt "Add 2 and 3." "Hello!" --expert math.safetensors my.safetensors

    Example: t2 generate smollm2-135m-instruct --prompt "Add 2 and 3." "Hello!" --bank experts/mine --adapt classifier

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        adapt: Let a first pass choose from the bank: the base asked for each prompt's domain, or an expert for that.
        dtype: Storage of the factors.
        max_new_tokens: Longest answer.
        sample: Sample instead of taking the likeliest token.
    """
    if adapt is not None:
        from t2.adaptation.command import answer, open_bank

        if expert:
            raise ValueError("expert: expected none with adapt, which chooses from --bank or --experts")
        chosen = open_bank(bank, experts, domains)
        answer(model, prompt, chosen, adapt, dtype=dtype, max_new_tokens=max_new_tokens, sample=sample)
        return 0
    if bank is not None or experts or domains:
        raise ValueError("adapt: expected prompt or classifier beside a bank, got none")

    from t2.experts.expert import Expert
    from t2.generation.prompts import prompt_batch
    from t2.model.load import load_svf
    from t2.model.svf_model import SVFConfig
    from t2.tasks.base import Problem, user_message
    from t2.weights.loading import tokenizer_of

    for name, given in (("expert", expert), ("image", image)):
        if len(given) not in (0, 1, len(prompt)):
            raise ValueError(f"{name}: expected none, one, or one for each of {len(prompt)} prompts, got {len(given)}")
    config = SVFConfig(dtype=getattr(torch, dtype))
    svf, tokenizer = load_svf(model, config, stream=stream, dtype=getattr(torch, model_dtype))
    for path in set(expert):
        svf.add_expert(str(path), Expert.load(path))
    files = list(image) * (len(prompt) if len(image) == 1 else 1)
    images = [tuple(files[i : i + 1]) for i in range(len(prompt))]
    problems = [Problem((user_message(text, len(own)),), images=own) for text, own in zip(prompt, images, strict=True)]
    batch = prompt_batch(problems, tokenizer)
    names = [str(path) for path in expert] * (len(prompt) if len(expert) == 1 else 1) or None
    out = svf.generate(**batch, experts=names, max_new_tokens=max_new_tokens, do_sample=sample)
    for text, row in zip(prompt, out[:, batch["input_ids"].shape[1] :], strict=True):
        print(f"> {text}\n{str(tokenizer_of(tokenizer).decode(row, skip_special_tokens=True)).strip()}\n")
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


@app.command
def transfer(
    model: tyro.conf.Positional[str],
    expert: Path,
    output: Path,
    target_modules: Targets = ("all-linear",),
    depth: Literal["relative", "absolute"] = "relative",
    ranks: Literal["leading", "relative"] = "leading",
    unmatched: Literal["error", "base"] = "error",
    shuffle_seed: int | None = None,
    task: str | None = None,
    task_options: str = "{}",
    problems: int = 200,
    shuffles: int = 3,
    results: Path | None = None,
    dtype: Storage = "float32",
) -> int:
    """Make an expert of another model one of this model, and measure it against the base and shuffled controls.

    Example: t2 transfer other/model --expert runs/sums/best.safetensors --output moved.safetensors --task gsm8k

    Args:
        model: The target: alias, Hub id, local folder or GGUF file.
        expert: File of the expert.
        output: File for the same expert as one of the target.
        depth: Layers match by relative depth, or by number.
        ranks: Different ranks match from the largest singular value on, or are stretched over each other.
        unmatched: What a matrix gets that has no like in the expert: an error, or z = 1.
        shuffle_seed: Writes the control instead, permuted within each matrix; also the first seed of --shuffles.
        task: Answers this task's test split with the base, the ordered expert and shuffled ones.
        task_options: Options of the task, as JSON.
        problems: How many of its problems.
        shuffles: How many shuffled controls.
        results: File for the figures as JSON; default the output's name with .json.
        dtype: Storage of the factors, for the task.
    """
    from t2 import tasks
    from t2.eval.transfer import measure
    from t2.experts.expert import Expert
    from t2.experts.layout import layout_of
    from t2.experts.transfer import TransferOptions, match
    from t2.experts.transfer import transfer as run
    from t2.model.svf_model import SVFConfig, SVFModel
    from t2.weights.factor_cache import weight_key
    from t2.weights.loading import load
    from t2.weights.targets import select_targets, weight_matrix

    source, out = Expert.load(expert), Console()
    options = TransferOptions(depth, ranks, unmatched)
    judged = tasks.get(task, **tasks.options_of(task_options)) if task else None
    loaded, tokenizer = load(model)
    svf = SVFModel(loaded, SVFConfig(_target_modules(target_modules), getattr(torch, dtype))) if judged else None
    if svf is None:
        targets = select_targets(loaded, _target_modules(target_modules))
        weights = {name: weight_matrix(layer) for name, layer in targets.items()}
        layout = layout_of(loaded, weights, {name: weight_key(weight) for name, weight in weights.items()})
    else:
        layout = svf.layout
    run(source, layout, options, shuffle_seed=shuffle_seed).save(output)
    found = match(source.layout, layout, depth)
    out.print(
        f"{output}: {len(layout.names) - len(found.unmatched)} of {len(layout.names)} matrices have the z of one of "
        f"the expert's, {len(found.unused)} of its {len(source.layout.names)} were not used"
    )
    if svf is None or judged is None:
        return 0
    seeds = range(shuffle_seed or 0, (shuffle_seed or 0) + shuffles)
    measured = measure(svf, source, judged, tokenizer, options, problems=problems, shuffle_seeds=seeds)
    table = Table(str(task), "right", "95% interval")
    for name, row in measured["conditions"].items():
        low, high = row["interval"]
        table.add_row(name, f"{row['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")
    out.print(table)
    write_text(results or output.with_suffix(".json"), json.dumps({"expert": str(expert)} | measured, indent=1) + "\n")
    return 0


@app.command
def adapt(
    model: tyro.conf.Positional[str],
    task: str,
    output: Path,
    options: tyro.conf.OmitArgPrefixes[FewShotOptions],
    bank: Bank = None,
    experts: NamedExperts = (),
    task_options: str = "{}",
    few_shot: int = 10,
    split: Literal["train", "validation", "test"] = "train",
    incumbent: str = "base",
    dtype: Storage = "float32",
    max_new_tokens: int | None = None,
) -> int:
    """Search for the mix of experts that answers a few problems of a task best. Ctrl-C keeps what is known so far.

    Example: t2 adapt smollm2-135m-instruct --bank experts/mine --task gsm8k --few-shot 10 --output gsm8k.safetensors

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        task: What to adapt to: a name that t2.tasks.get knows.
        output: File for the mixed expert.
        options: Of the search.
        task_options: Options of the task, as JSON.
        few_shot: Problems that candidates are tried on.
        split: Where these are drawn from; not the ones that the result is to be judged on.
        incumbent: What stays unless a mix is better by --margin: base, an expert, or what prompt or classifier give
            the most of these problems to.
        dtype: Storage of the factors.
        max_new_tokens: Longest answer; the task's own room if none is given.
    """
    from t2.adaptation.command import adapt_to_task, open_bank

    finished = adapt_to_task(
        model,
        open_bank(bank, experts),
        task,
        output,
        task_options=task_options,
        few_shot=few_shot,
        split=split,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        options=options,
        incumbent=incumbent,
        console=Console(),
    )
    return 0 if finished else 130


@app.command(name="eval")
def evaluate(
    model: tyro.conf.Positional[str],
    bank: Path,
    plan: Path,
    output: Path,
    only: tuple[Section, ...] = SECTIONS,
    dtype: Storage = "float32",
    bf16_products: bool = False,
    token_budget: int = 16384,
) -> int:
    """Measure a bank of experts: the tables of the paper, times and ablations. Ctrl-C keeps what was measured.

    Example: t2 eval smollm2-135m-instruct --bank experts/mine --plan plan.json --output runs/eval

    Args:
        model: Alias, Hub id, local folder or GGUF file.
        bank: Folder with experts and domains.json (docs/adaptation.md).
        plan: JSON file that says what is measured (docs/adaptation.md).
        output: Folder for results.json, summary.json, tables.md, plots, and what was measured so far.
        only: Sections to measure.
        dtype: Storage of the factors.
        bf16_products: Let activations be rounded to bfloat16 where they meet bfloat16 factors.
        token_budget: Most tokens of a batch, padding and answers included.
    """
    from t2.eval.command import run_evaluation

    finished = run_evaluation(
        model,
        bank,
        plan,
        output,
        only=only,
        dtype=dtype,
        bf16_products=bf16_products,
        token_budget=token_budget,
    )
    return 0 if finished else 130


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `t2` command. Errors in the input end it with one line and exit code 2."""
    try:
        code = app.cli(prog="t2", description="Transformer-squared on fused SVF kernels.", args=args)
    except (ValueError, TypeError, OSError) as error:
        print(f"t2: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)
