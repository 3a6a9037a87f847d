"""The `t2 generate` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from t2.adaptation.strategies import PASS_ONE, PassOne
from t2.cli.options import OPTIONAL, Bank, Candidates, FactorDtype, Model, ModelDtype, Prompts, Stream

if TYPE_CHECKING:
    from t2.generation.sampling import Sampling


def run(
    model: Model,
    prompt: Annotated[Prompts, arg(help_behavior_hint=OPTIONAL)] = (),
    input: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=OPTIONAL)] = None,
    expert: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint=OPTIONAL)] = (),
    adapt: Annotated[PassOne | None, arg(help_behavior_hint=OPTIONAL)] = None,
    bank: Bank = None,
    candidates: Candidates = (),
    domains: Annotated[tuple[str, ...], arg(metavar="NAME=TEXT ...", help_behavior_hint=OPTIONAL)] = (),
    image: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint=OPTIONAL)] = (),
    factor_dtype: FactorDtype = "float32",
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    model_dtype: ModelDtype = "float32",
    stream: Stream = "auto",
) -> int:
    """Answer prompts in one batch, each with its own expert: given by --expert, or chosen by --adapt; or a whole file.

    Example: t2 generate smollm2-135m-instruct --prompt "Add 2 and 3." "Hello!" --expert math.safetensors my.safetensors

    Example: t2 generate smollm2-135m-instruct --prompt "Add 2 and 3." "Hello!" --bank experts/mine --adapt classifier

    Example: t2 generate smollm2-135m-instruct --bank experts/mine --input prompts.jsonl --output answers.jsonl

    Args:
        input: Requests, one JSON object a line: prompt or messages; optionally model (an expert, a mix, auto),
            max_tokens, temperature, top_p, seed, stop, id. Needs --output.
        output: File for the answers, one a line. The same command goes on with it after an interruption.
        expert: One expert file for all prompts, or one per prompt; without any the base model answers.
        adapt: First pass that chooses an expert per prompt from --bank or --candidates: the base model (prompt), or a
            classification expert (classifier).
        domains: One line for each of --candidates on the questions it is for.
        image: One image file for all prompts, or one per prompt; for a vision-language model.
        max_new_tokens: Maximum length of a completion, in tokens.
        temperature: Sampling temperature; 0 decodes greedily. With --input, of the lines that have none of their own.
        top_p: Probability mass of the likeliest tokens that are sampled from. With --input as --temperature.
        seed: Seed for sampling. With --input as --temperature.
    """
    from t2.generation.sampling import Sampling

    sampling = Sampling(temperature, top_p, seed)
    if input is not None:
        others: dict[str, object] = {"prompt": prompt, "expert": expert, "candidates": candidates, "image": image}
        others |= {"domains": domains, "adapt": adapt}
        if beside := [name for name, value in others.items() if value]:
            raise ValueError(f"input: expected none of {', '.join(others)} beside it, got {', '.join(beside)}")
        if output is None:
            raise ValueError("output: expected a file for the answers beside --input, got none")
        return _answer_file(model, bank, input, output, factor_dtype, max_new_tokens, sampling)
    if not prompt or output is not None:
        raise ValueError("prompt: expected at least one, or --input and --output")
    if adapt is not None:
        from t2.adaptation.command import answer, open_bank

        if expert:
            raise ValueError("expert: expected none with --adapt, which chooses from --bank or --candidates")
        opened = open_bank(bank, candidates, domains)
        answer(model, prompt, opened, adapt, dtype=factor_dtype, max_new_tokens=max_new_tokens, sampling=sampling)
        return 0
    if bank is not None or candidates or domains:
        raise ValueError(f"adapt: expected {' or '.join(PASS_ONE)} beside a bank, got none")
    for name, given in (("expert", expert), ("image", image)):
        if len(given) not in (0, 1, len(prompt)):
            raise ValueError(f"{name}: expected none, one, or one for each of {len(prompt)} prompts, got {len(given)}")

    import torch

    from t2.experts.expert import Expert
    from t2.generation.prompts import prompt_batch
    from t2.model.load import load_svf
    from t2.model.svf_model import SVFConfig
    from t2.tasks.base import Problem, user_message
    from t2.weights.loading import tokenizer_of

    config = SVFConfig(dtype=getattr(torch, factor_dtype))
    svf, tokenizer = load_svf(model, config, stream=stream, dtype=getattr(torch, model_dtype))
    for path in set(expert):
        svf.add_expert(str(path), Expert.load(path))
    files = list(image) * (len(prompt) if len(image) == 1 else 1)
    images = [tuple(files[i : i + 1]) for i in range(len(prompt))]
    problems = [Problem((user_message(text, len(own)),), images=own) for text, own in zip(prompt, images, strict=True)]
    batch = prompt_batch(problems, tokenizer)
    names = [str(path) for path in expert] * (len(prompt) if len(expert) == 1 else 1) or None
    out = svf.generate(**batch, experts=names, max_new_tokens=max_new_tokens, **sampling.seeded())
    for text, row in zip(prompt, out[:, batch["input_ids"].shape[1] :], strict=True):
        print(f"> {text}\n{str(tokenizer_of(tokenizer).decode(row, skip_special_tokens=True)).strip()}\n")
    return 0


def _answer_file(
    model: str, bank: Path | None, source: Path, output: Path, dtype: str, max_tokens: int, sampling: Sampling
) -> int:
    import torch
    from rich.console import Console

    from t2.server.batch import answer_file, read_lines
    from t2.server.opened import open_engine

    lines = read_lines(source, sampling)  # what is wrong with them is said before a model is loaded
    console = Console(stderr=True)
    opened = open_engine(model, bank, dtype=getattr(torch, dtype), news=console.print)
    return 0 if answer_file(opened, lines, output, max_tokens=max_tokens, console=console) else 130
