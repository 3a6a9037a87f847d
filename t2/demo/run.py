"""The demo: a batch dispatched to experts (`t2.demo.bank`), then a batch with a different expert per request, checked
against merged models and timed beside the baselines."""

from __future__ import annotations

import copy
import json
import platform
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

import t2kernels
from t2.adaptation.bank_folder import SHIPPED, bank_path, load_bank_folder
from t2.demo import baselines as peers
from t2.demo.bank import bank_tasks, show_bank
from t2.demo.merged_check import RowCheck, check_row
from t2.demo.throughput import PathResult, ServingPath, fixed_length, time_paths
from t2.experts.expert import Expert
from t2.model.svf_model import SVFConfig, SVFModel
from t2.weights.factor_cache import FactorCache
from t2.weights.loading import load
from t2.weights.machine import machine
from t2kernels import Factors

QUESTIONS = (
    "What is the capital of France?",
    "Add 17 and 25.",
    "Write a haiku about rain.",
    "What is 9 times 8?",
    "Name three primary colours.",
    "Spell the word 'necessary' backwards.",
    "Who wrote Hamlet?",
    "How many legs does a spider have?",
    "Write a Python function that doubles a number.",
    "What is the boiling point of water?",
    "Give me a synonym for 'happy'.",
    "Translate 'good morning' into French.",
    "What do bees make?",
    "Is 91 a prime number?",
    "Name the largest planet.",
    "What is the opposite of 'ancient'?",
    "Count from one to five.",
    "Why is the sky blue?",
    "What is the square root of 144?",
    "Suggest a name for a cat.",
    "Which ocean is the deepest?",
    "What does CPU stand for?",
    "Write one sentence about the moon.",
    "How many days are in a leap year?",
    "What is the past tense of 'go'?",
    "Name a fruit that is yellow.",
    "What is 100 minus 37?",
    "Who painted the Mona Lisa?",
    "What is the chemical symbol of gold?",
    "Give one tip for better sleep.",
    "How do you boil an egg?",
    "What is the plural of 'mouse'?",
)


def chat_batch(tokenizer: Any, questions: list[str]) -> dict[str, Any]:
    """The questions as one left-padded batch of chat prompts, ready for `generate`."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False))


def run_demo(
    model_name: str = "smollm2-135m-instruct",
    *,
    dtype: torch.dtype = torch.float32,
    requests: int = 32,
    new_tokens: int = 16,
    checked_tokens: int = 32,
    std: float = 0.1,
    results: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Run the demo; True if every row of the mixed batch equals its merged model.

    Args:
        model_name: base model, as `t2.load` takes it.
        dtype: dtype in which the factors are stored.
        requests: rows of the batch, each with an expert of its own, 1 to 32.
        new_tokens: tokens generated per request where speed is measured.
        checked_tokens: tokens compared with the merged models.
        std: the experts are z = 1 + std * N(0, 1), seeds 0, 1, 2, ...
        results: file for the figures as JSON.
    """
    if not 1 <= requests <= len(QUESTIONS):
        raise ValueError(f"requests: expected 1 to {len(QUESTIONS)}, got {requests}")
    if new_tokens < 2:
        raise ValueError(f"new_tokens: expected at least 2, got {new_tokens}")
    out = console or Console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # transformers, by way of PEFT
    out.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"t2kernels on the CPU: {t2kernels.backends()['cpu']}"
    )

    start = time.perf_counter()
    model, tokenizer = load(model_name)
    out.print(f"{model_name}: {model.num_parameters():,} parameters, loaded in {time.perf_counter() - start:.1f} s")
    dense: Any = copy.deepcopy(model)
    start = time.perf_counter()
    svf = SVFModel(model, SVFConfig(dtype=dtype))
    layout = svf.layout
    cache = FactorCache()
    worst = max(cache.error(key) for key in svf.weight_keys.values())
    out.print(
        f"{len(layout.names)} matrices decomposed, or read from {cache.directory}, "
        f"in {time.perf_counter() - start:.1f} s; "
        f"largest relative error {worst:.1e}; an expert has {layout.R:,} parameters"
    )

    adapted = None
    if (SHIPPED / model_name / "domains.json").is_file():
        folder = bank_path(model_name)
        adapted = show_bank(out, svf, tokenizer, load_bank_folder(folder), bank_tasks(folder), QUESTIONS[:5])
        for name in svf.bank.names:
            svf.remove_expert(name)
    names = [f"expert{i:02}" for i in range(requests)]
    for seed, name in enumerate(names):
        svf.add_expert(name, Expert.random(layout, std=std, seed=seed))
    out.print(
        f"What {requests} experts in a batch cost: these are drawn around 1 (std {std}, seeds 0 to {requests - 1}).\n"
    )
    questions = list(QUESTIONS[:requests])
    batch = chat_batch(tokenizer, questions)

    with out.status(f"generating {checked_tokens} tokens for {requests} requests with {requests} experts"):
        generated = svf.generate(
            **batch,
            experts=names,
            **fixed_length(checked_tokens),
            return_dict_in_generate=True,
            output_logits=True,
        )
    _show_answers(out, tokenizer, questions, names, generated.sequences[:, batch["input_ids"].shape[1] :])

    factors = {name: cache.load(key) for name, key in svf.weight_keys.items()}
    measured = _time_paths(out, model_name, dense, svf, factors, batch, new_tokens)
    checks, rebuilt = _check_rows(out, dense, svf, factors, batch, generated)
    measured.append(rebuilt)

    same = _show_checks(out, checks, checked_tokens)
    _show_speed(out, measured)
    if results is not None:
        figures = {
            "model": model_name,
            "dtype": str(dtype).removeprefix("torch."),
            "machine": machine(),
            "adaptation": adapted,
            "rows_equal_to_merged_model": sum(c.equal for c in checks),
            "largest_logit_difference": max(c.logit_difference for c in checks),
            "paths": [
                asdict(m)
                | {"tokens_per_second": m.tokens_per_second, "decode_tokens_per_second": m.decode_tokens_per_second}
                for m in measured
            ],
        }
        results.write_text(json.dumps(figures, indent=1) + "\n")
    return same


def _time_paths(
    out: Console,
    model_name: str,
    dense: Any,
    svf: SVFModel,
    factors: Mapping[str, Factors],
    batch: Mapping[str, Tensor],
    new_tokens: int,
) -> list[PathResult]:
    """Time all serving paths; the first result is ours."""
    names, layout = svf.bank.names, svf.layout
    with out.status("preparing the baselines") as status:
        factored = copy.deepcopy(dense)
        peers.use_torch_factored(factored, factors, layout, svf.bank.matrix)
        suffixes = sorted({name.rpartition(".")[2] for name in layout.names})
        lora, adapters = peers.with_lora(load(model_name)[0], suffixes, len(names))
        paths = [
            ServingPath("ours", len(names), lambda n, **kw: svf.generate(experts=names[:n], **kw), rounds=2),
            ServingPath("dense, no experts", 0, lambda n, **kw: dense.generate(**kw), rounds=2),
            ServingPath("torch factored", len(names), lambda n, **kw: factored.generate(**kw), rounds=1),
            ServingPath(
                "PEFT LoRA r=16, mixed",
                len(names),
                lambda n, **kw: lora.generate(adapter_names=adapters[:n], **kw),
                rounds=1,
            ),
        ]
        return time_paths(paths, batch, new_tokens, lambda name: status.update(f"timing: {name}"))


def _check_rows(
    out: Console,
    dense: Any,
    svf: SVFModel,
    factors: Mapping[str, Factors],
    batch: Mapping[str, Tensor],
    generated: Any,
) -> tuple[list[RowCheck], PathResult]:
    """Compare every row with W' rebuilt for its expert; time generation after the first four rebuilds."""
    checks, seconds = [], 0.0
    timed, tokens = min(4, len(svf.bank)), 16
    with out.status("checking each row against its merged model"):
        for row, name in enumerate(svf.bank):
            start = time.perf_counter()
            peers.rebuild(dense, factors, svf.layout, svf.bank[name].z)
            if row < timed:
                prompt = batch["input_ids"][row : row + 1, batch["attention_mask"][row].argmax() :]
                dense.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **fixed_length(tokens))
                seconds += time.perf_counter() - start
            checks.append(check_row(dense, batch, generated, row, name))
    return checks, PathResult("W' rebuilt per expert", 1, timed, tokens, [seconds])


def _show_answers(out: Console, tokenizer: Any, questions: list[str], names: list[str], answers: Tensor) -> None:
    table = Table("request", "expert", "answer", title="One batch, an expert for every request (4 of them)")
    for row in range(min(4, len(questions))):
        ends = (answers[row] == tokenizer.eos_token_id).nonzero()
        answer = answers[row, : int(ends[0])] if len(ends) else answers[row]
        text = tokenizer.decode(answer, skip_special_tokens=True).replace("\n", " ")
        table.add_row(questions[row], names[row], text[:70])
    out.print(table)


def _show_checks(out: Console, checks: list[RowCheck], tokens: int) -> bool:
    passed = sum(check.passed for check in checks)
    out.print(
        f"\nMixed batch against merged models: {sum(c.equal for c in checks)} of {len(checks)} rows give the same "
        f"{tokens} greedy tokens; largest logit difference {max(c.logit_difference for c in checks):.1e}"
    )
    for check in checks:
        for position, gap in check.ties:
            verdict = "a tie within that difference" if check.passed else "MORE than numerical error"
            out.print(f"  {check.expert}: differs at token {position}, leading logits {gap:.1e} apart: {verdict}")
    return passed == len(checks)


def _show_speed(out: Console, measured: list[PathResult]) -> None:
    """Print the speed of all paths beside ours, the first result."""
    ours = measured[0]
    table = Table(
        title=f"{ours.new_tokens} new tokens for {ours.requests} requests; decode: once the prompts are read",
        caption="'ours' is ours over this path",
    )
    table.add_column("path", no_wrap=True)
    for column in ("experts", "tokens/s", "ours", "decode", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in sorted(measured, key=lambda m: -m.tokens_per_second):
        cells = [f"{result.tokens_per_second:.1f}", f"{ours.tokens_per_second / result.tokens_per_second:.2f}x"]
        decode, our_decode = result.decode_tokens_per_second, ours.decode_tokens_per_second
        cells += [f"{decode:.1f}", f"{our_decode / decode:.2f}x"] if decode and our_decode else ["", ""]
        table.add_row(result.name, str(result.experts), *cells)
    out.print(table)
