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
PLAIN = "no experts"
LORAS: dict[str, dict[str, Any]] = {
    "LoRA, rank 16": {"enable_lora": True},
    "LoRA, rank 16, lora_target_modules": {"enable_lora": True, "lora_target_modules": TARGETS},
}
"""Without `lora_target_modules` vLLM adds LoRA to embeddings and logits too."""
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
    prompts = [[100 + i + j for j in range(PROMPT)] for i in range(EXPERTS)]
    plain = started(python, folder, {}, None)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in tqdm([*TIMED, *LORAS], desc="ways"):
        if name in TIMED:
            options = ADAPTERS | {"max_loras": EXPERTS, "quantization": TIMED[name]}
            worker, given = started(python, folder, options, bank), {"experts": names}
        else:
            options = LORAS[name] | {"max_lora_rank": 16, "max_loras": EXPERTS}
            worker, given = started(python, folder, options, None), {"adapters": adapters}
        turns: dict[str, list[dict[str, float]]] = {"own": [], PLAIN: []}
        for turn in range(rounds + 1):  # the first one warms up
            for key, each, extra in (("own", worker, given), (PLAIN, plain, {})):
                seconds = each.ask(prompts=prompts, new_tokens=new_tokens, **extra)
                turns[key] += [seconds] if turn else []
        worker.close()
        found[name] = turns
    about = plain.about
    plain.close()
    return {"rounds": rounds, "new_tokens": new_tokens, "ways": found, **about}


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
    """Tokens a second behind the prompts, and ratios to vLLM without experts in the same turns."""
    timed = results["speed"]

    def speeds_of(turns: list[dict[str, float]]) -> list[float]:
        made = EXPERTS * (timed["new_tokens"] - 1)
        return [made / (turn["seconds"] - turn["prompt_seconds"]) for turn in turns]

    def seconds(turns: list[dict[str, float]]) -> str:
        return f"{statistics.median(turn['prompt_seconds'] for turn in turns):.2f}"

    plain = [turn for way in timed["ways"].values() for turn in way[PLAIN]]
    ratios = {
        name: statistics.median(a / b for a, b in zip(speeds_of(way["own"]), speeds_of(way[PLAIN]), strict=True))
        for name, way in timed["ways"].items()
    }
    rows = [[PLAIN, f"{statistics.median(speeds_of(plain)):.0f}", "1.00", "", seconds(plain)]]
    for name, way in timed["ways"].items():
        beside = [f"{ratios[name] / ratios[lora]:.1f}" for lora in LORAS if name in TIMED]
        speed = f"{statistics.median(speeds_of(way['own'])):.0f}"
        rows.append([name, speed, f"{ratios[name]:.2f}", ", ".join(beside), seconds(way["own"])])
    machine_ = results["machine"]
    return Table(
        f"vLLM {timed['vllm']}, {EXPERTS} requests with an expert each, support of {SUPPORT}, bfloat16, "
        f"{timed['new_tokens']} tokens behind {PROMPT}, {machine_['threads']} cores of {machine_['processor']}, each "
        f"way in turns with vLLM without experts, medians of {timed['rounds']}:",
        ["", "tokens/s of answers", "/ no experts", "/ LoRA of both kinds", "s for the prompts"],
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
