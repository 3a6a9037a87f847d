"""One step of REINFORCE on a model of Llama-3-8B's shapes on one GPU, against the planned memory (`t2 estimate`).

int8 factors, activation checkpointing, 2 prompts x 4 completions of 128 + 64 tokens, through the trainer's own code.
Weights and factors are random. The first step compiles the kernels; the second one is reported. The plan adds weights,
trainable parameters with Adam's state, and the phase; the peaks are what torch's allocator handed out.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.common.random_task import SPECIAL, Parity, word_tokenizer
from benchmarks.gpu.end_to_end import Store, dense_model, factored_model, llama_config, peak_bytes, start_peak, wait
from t2 import SVFConfig
from t2.training import Trainer, TrainOptions
from t2.weights.estimate import estimate_model
from t2.weights.step_sizes import StepSizes

WORK = StepSizes(prompt_tokens=128, new_tokens=64, prompts_per_step=2, samples_per_prompt=4)
SMOKE_WORK = StepSizes(prompt_tokens=8, new_tokens=4, prompts_per_step=2, samples_per_prompt=2)


def options(work: StepSizes, output: Path) -> TrainOptions:
    return TrainOptions(
        task="parity",
        output=output,
        prompts_per_step=work.prompts_per_step,
        samples_per_prompt=work.samples_per_prompt,
        factor_dtype="int8",
        model_dtype="bfloat16",
        gradient_checkpointing=True,
        token_budget=work.rows * (work.prompt_tokens + work.new_tokens),  # all completions at once
        skip_zero_advantage=False,
        trackers=(),
    )


def planned(config: LlamaConfig, work: StepSizes, folder: Path) -> dict[str, float]:
    """Bytes of the model and of both phases of a step."""
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    plan = estimate_model(path, dtype=torch.bfloat16)
    model = plan.serving(torch.int8)
    return {
        "model": model,
        "rollout_peak": model + plan.learnt + plan.rollout(work),
        "update_peak": model + plan.learnt + plan.update(work, work.prompts_per_step, work.rows, checkpointing=True),
        "training_peak": plan.training(torch.int8, work, work.prompts_per_step, work.rows, checkpointing=True),
    }


def steps(config: LlamaConfig, work: StepSizes, device: torch.device, folder: Path) -> dict[str, Any]:
    """Two steps of the trainer; seconds and peaks of the second."""
    start = time.perf_counter()
    svf = factored_model(dense_model(config, device, "sdpa"), SVFConfig(dtype=torch.int8, cache=False, progress=False))
    start_peak(device)
    model = peak_bytes(device)
    words = config.vocab_size - len(SPECIAL)
    task, knobs = Parity(work, words), options(work, folder / "run")
    trainer = Trainer(svf, word_tokenizer(config.vocab_size), task, knobs)
    built = time.perf_counter() - start
    seconds: list[dict[str, float]] = []
    row: dict[str, Any] = {}
    for _ in range(2):
        start_peak(device)
        start = time.perf_counter()
        groups, row = trainer._drawn()
        wait(device)
        drawn, rollout_peak = time.perf_counter(), peak_bytes(device)
        start_peak(device)
        resumed = time.perf_counter()
        row |= trainer._update(groups)
        wait(device)
        seconds.append({"rollout": drawn - start, "update": time.perf_counter() - resumed})
        update_peak = peak_bytes(device)
    tokens = work.rows * row["length"]
    return {
        "build_seconds": built,
        "first_step_seconds": seconds[0]["rollout"] + seconds[0]["update"],
        "rollout_seconds": seconds[1]["rollout"],
        "update_seconds": seconds[1]["update"],
        "rollout_tokens_per_second": tokens / seconds[1]["rollout"],
        "reward": row["reward"],
        "length": row["length"],
        "gradient_norm": row["gradient_norm"],
        "bytes": {"model": model, "rollout_peak": rollout_peak, "update_peak": update_peak},
    }


def measure(results: Store, device: torch.device, smoke: bool) -> None:
    """Stores "rl step": seconds, peaks, and the plan of each peak."""
    config, work = llama_config(smoke), SMOKE_WORK if smoke else WORK

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            plan = planned(config, work, Path(folder))
            return {
                "layers": config.num_hidden_layers,
                "work": vars(work),
                **steps(config, work, device, Path(folder)),
                "planned_bytes": plan,
            }

    found = results.once("rl step", run)
    start_peak(device)
    if "error" in found:
        print(f"rl step: {found['error']}", flush=True)
        return
    peaks = [
        f"{name} {measured / 1e9:.2f} GB (planned {found['planned_bytes'][name] / 1e9:.2f})"
        for name, measured in found["bytes"].items()
        if measured is not None
    ]
    phases = f"rollout {found['rollout_seconds']:.2f} s, update {found['update_seconds']:.2f} s"
    print(f"rl step: {', '.join([phases, *peaks])}", flush=True)
