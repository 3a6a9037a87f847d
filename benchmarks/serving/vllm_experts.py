"""Experts in vLLM through `t2.integrations.vllm`: answers beside merged models, and speed beside plain vLLM and LoRA.

    python -m benchmarks.serving.vllm_experts --vllm-python PATH

PATH is the Python of an environment with vLLM's CPU build and this package. First 200 requests of the base, 3 experts
and 5 mixes in one engine, greedy in float32, beside models with each of them built in. Then 32 requests, an expert for
each, in bfloat16: both forms, LoRA adapters of rank 16, and vLLM without any, in turns. Writes
benchmarks/results/vllm-experts.json.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from benchmarks.serving.engine_peers import Worker
from t2.adaptation.bank_folder import SHIPPED, load_bank_folder
from t2.adaptation.base import mixed
from t2.demo.run import QUESTIONS
from t2.experts.mixes import parse_mix
from t2.generation.prompts import encode
from t2.integrations.export import export_lora
from t2.tasks.base import Problem, user_message
from t2.weights.machine import machine

MODEL, SUPPORT, EXPERTS, PROMPT = "smollm2-135m-instruct", 64, 32, 40
MIXES = (
    "sums:0.5+logic:0.5",
    "sums:0.7+reading:0.3",
    "reading:1.5+base:-0.5",
    "logic:0.5+base:0.5",
    "sums:1+reading:1+base:-1",
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"enable_lora": True, "max_lora_rank": 1, "lora_target_modules": TARGETS}
CHECKED = {"factored": "t2_svf", "delta, our kernels": "t2_svf_delta", "delta, vLLM's kernels": None}
PLAIN, LORA = "no experts", "LoRA, rank 16"
TIMED: dict[str, str | None] = {
    "experts, delta, vLLM's kernels for W x": None,
    "experts, delta, our kernels": "t2_svf_delta",
    "experts, delta, W in 4 bits": "t2_svf_delta_int4",
    "experts, factored": "t2_svf",
}


def tied(svf: t2.SVFModel, expert: Any, prompt: list[int], ours: list[int], merged: list[int]) -> float | None:
    """Difference of the two tokens' logits at the first place where answers differ; None where none does."""
    place = next((i for i, (a, b) in enumerate(zip(ours, merged, strict=True)) if a != b), None)
    if place is None:
        return None
    with torch.inference_mode():
        logits = svf.merged_copy(expert)(torch.tensor([prompt + merged[:place]])).logits[0, -1]
    return float((logits[merged[place]] - logits[ours[place]]).abs())


def merged_answers(
    svf: t2.SVFModel, choices: dict[str, Any], asked: list[tuple[str, list[int]]], new_tokens: int
) -> Any:
    """The greedy tokens of models with an expert built in, by transformers, a prompt at a time."""
    answers: list[list[int]] = [[] for _ in asked]
    with tqdm(total=len(asked), desc="merged models", mininterval=5) as bar:
        for name, choice in choices.items():
            model: Any = svf.merged_copy(choice)
            model.generation_config.eos_token_id = None
            for place, (expert, prompt) in enumerate(asked):
                if expert == name:
                    given = torch.tensor([prompt])
                    out = model.generate(given, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
                    answers[place] = out[0, len(prompt) :].tolist()
                    bar.update()
    return answers


def check(python: Path, folder: Path, requests: int, new_tokens: int) -> dict[str, Any]:
    """Answers of vLLM in float32 beside those of merged models."""
    model, tokenizer = t2.load(MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    bank = load_bank_folder(MODEL)
    bank.add_to(svf)
    choices: dict[str, Any] = {"base": None} | {domain.name: domain.name for domain in bank.domains}
    for mix in MIXES:
        weights = parse_mix(mix) or {}
        choices[mix] = mixed(svf.bank, list(weights), torch.tensor([list(weights.values())]))[0]
    draw = random.Random(0)
    asked = []
    for i in range(requests):
        words = f"{draw.choice(QUESTIONS)} ({i})"
        asked.append((list(choices)[i % len(choices)], encode(Problem((user_message(words),)), tokenizer).tolist()))
    merged = merged_answers(svf, choices, asked, new_tokens)
    found = {}
    for name, method in CHECKED.items():
        options = ADAPTERS | {"max_loras": 8, "max_cpu_loras": 8, "dtype": "float32", "quantization": method}
        worker = started(python, folder, options, SHIPPED / MODEL)
        experts = [None if expert == "base" else expert for expert, _ in asked]
        prompts = [prompt for _, prompt in asked]
        answers = worker.ask(prompts=prompts, experts=experts, new_tokens=new_tokens, answers=True)["answers"]
        worker.close()
        gaps = [
            tied(svf, choices[expert], prompt, ours, theirs)
            for (expert, prompt), ours, theirs in zip(asked, answers, merged, strict=True)
        ]
        found[name] = {"same": gaps.count(None), "gaps": [gap for gap in gaps if gap is not None]}
    return {"requests": requests, "new_tokens": new_tokens, "choices": list(choices), "forms": found}


def started(python: Path, folder: Path, options: dict[str, Any], bank: Path | None) -> Worker:
    """A worker, stopped until it is asked."""
    given = {"PYTHONPATH": str(ROOT)} | ({} if bank is None else {"T2_BANK": str(bank)})
    return Worker(python, "vllm_worker.py", str(folder), json.dumps(options), environment=given)


def speeds(python: Path, folder: Path, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of every way by turn: of the prompts with a token each, and of all."""
    model, _ = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(form="delta", support=SUPPORT, progress=False))
    bank = folder / "bank"
    bank.mkdir()
    adapters = []
    for i in range(EXPERTS):
        noise = torch.randn(len(svf.slot_table.column_sigma), generator=torch.Generator().manual_seed(i))
        expert = t2.Expert(svf.slot_table.with_columns(1 + 0.02 * noise), svf.layout)
        expert.save(bank / f"e{i}.safetensors")
        adapters.append(str(folder / f"lora-{i}"))
        export_lora(svf, expert, adapters[-1], 16)
    names = [f"e{i}" for i in range(EXPERTS)]
    workers = {PLAIN: started(python, folder, {}, None)}
    for name, method in TIMED.items():
        options = ADAPTERS | {"max_loras": EXPERTS, "quantization": method}
        workers[name] = started(python, folder, options, bank)
    lora = ADAPTERS | {"max_lora_rank": 16, "max_loras": EXPERTS}
    workers[LORA] = started(python, folder, lora, None)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    prompts = [[100 + i + j for j in range(PROMPT)] for i in range(EXPERTS)]
    for turn in tqdm(range(rounds + 1), desc="turns"):  # the first one warms up
        for name, worker in workers.items():
            given: dict[str, Any] = {"experts": names} if name in TIMED else {}
            given = {"adapters": adapters} if name == LORA else given
            seconds = worker.ask(prompts=prompts, new_tokens=new_tokens, **given)
            for key in ("seconds", "prompt_seconds") if turn else ():
                found[name].setdefault(key, []).append(seconds[key])
    about = workers[PLAIN].about
    for worker in workers.values():
        worker.close()
    return {"rounds": rounds, "new_tokens": new_tokens, "paths": found, **about}


def answers_table(results: Any) -> Table:
    """Requests whose tokens are those of the merged model; the largest difference of logits where one is not."""
    checked = results["answers"]
    rows = [
        [
            name,
            f"{form['same']} of {checked['requests']}",
            f"{max(form['gaps'], default=0):.1e}" if form["gaps"] else "",
        ]
        for name, form in checked["forms"].items()
    ]
    return Table(
        f"{checked['requests']} requests in one engine, of the base, 3 experts and {len(MIXES)} mixes, "
        f"{checked['new_tokens']} greedy tokens each in float32 (`python -m benchmarks.serving.vllm_experts`):",
        ["form", "the tokens of the merged model", "largest gap of logits where not"],
        rows,
    )


def speed_table(results: Any) -> Table:
    """Tokens a second behind the prompts, and ratios to vLLM without experts and with LoRA."""
    timed = results["speed"]
    speed = {
        name: [
            EXPERTS * (timed["new_tokens"] - 1) / (whole - prompts)
            for whole, prompts in zip(path["seconds"], path["prompt_seconds"], strict=True)
        ]
        for name, path in timed["paths"].items()
    }

    def ratio(name: str, peer: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(speed[name], speed[peer], strict=True)):.2f}"

    rows = [
        [
            name,
            f"{statistics.median(made):.0f}",
            ratio(name, PLAIN),
            ratio(name, LORA),
            f"{statistics.median(timed['paths'][name]['prompt_seconds']):.2f}",
        ]
        for name, made in speed.items()
    ]
    machine_ = results["machine"]
    return Table(
        f"vLLM {timed['vllm']}, {EXPERTS} requests with an expert each, support of {SUPPORT}, bfloat16, "
        f"{timed['new_tokens']} tokens behind {PROMPT}, {machine_['threads']} cores of {machine_['processor']}, in "
        f"turns, medians of {timed['rounds']}:",
        ["", "tokens/s of answers", "/ no experts", "/ LoRA", "s for the prompts"],
        rows,
    )


def main(
    vllm_python: Path,
    requests: int = 200,
    new_tokens: int = 32,
    rounds: int = 4,
    results: Path = RESULTS / "vllm-experts.json",
) -> None:
    """Args:
    vllm_python: Python with vLLM for CPUs and this package.
    requests: Answers to compare with those of merged models; 0 keeps what the file for the results has.
    new_tokens: Of each of them.
    rounds: Turns that each way takes.
    results: File for the results as JSON.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        if requests:
            answers = check(vllm_python, Path(folder) / "checked", requests, new_tokens)
        else:
            answers = json.loads(results.read_text())["answers"]
        (Path(folder) / "timed").mkdir()
        model, tokenizer = t2.load(MODEL)
        model.save_pretrained(Path(folder) / "timed")
        tokenizer.save_pretrained(Path(folder) / "timed")
        speed = speeds(vllm_python, Path(folder) / "timed", rounds, 64)
    content = {"machine": machine(), "answers": answers, "speed": speed}
    write_results(results, content)
    answers_table(content).show()
    speed_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
