"""SVF trained by TRL's GRPOTrainer through PEFT, and by `t2 train`: one task, one base, as many completions.

    python -m benchmarks.training.trl_grpo

SmolLM2-135M-Instruct on sums of two numbers, rewards alone, bfloat16 factors, GRPO's advantages, the same rate, KL
coefficient, prompts a step and completions a prompt. Each run is a process of its own. The experts after the last
step answer the same 200 fresh problems, greedy. Writes benchmarks/results/trl-grpo.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro

import t2
from benchmarks.common.memory import AnonymousPeak
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from benchmarks.training.step_speed import MODEL, TASK, TASK_OPTIONS, for_trl
from t2.generation.evaluate import evaluate_experts
from t2.tasks import Task, get
from t2.training import Trainer, TrainOptions
from t2.weights.loading import tokenizer_of
from t2.weights.machine import machine

PROMPTS, SAMPLES, TOKENS, RATE, KL, PROBLEMS = 8, 8, 12, 3e-3, 0.01, 200
T2, TRL = "t2 train", "TRL's GRPOTrainer"


def trained_by_t2(task: Task, folder: Path, steps: int, seed: int) -> tuple[t2.Expert, list[dict[str, float]]]:
    model, tokenizer = t2.load(MODEL)
    options = TrainOptions(
        task=TASK,
        task_options=TASK_OPTIONS,
        output=folder,
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        max_new_tokens=TOKENS,
        learning_rate=RATE,
        kl_coefficient=KL,
        baseline="group",
        normalise_rewards=True,
        seed=seed,
        factor_dtype="bfloat16",
        bf16_products=True,
        validate_every=10**9,
        save_every=10**9,
        steps=steps,
        trackers=(),
    )
    trainer = Trainer(model, tokenizer, task, options)
    rows = [{"seconds": row["seconds"], "reward": row["reward"]} for row in (trainer.step() for _ in range(steps))]
    return t2.Expert.load(trainer.policy.save(folder / "last.safetensors", {})), rows


def trained_by_trl(task: Task, folder: Path, steps: int, seed: int) -> tuple[t2.Expert, list[dict[str, float]]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from t2.integrations.peft import SVFConfig, expert_of

    model, tokenizer = t2.load(MODEL)
    lines, rewards = for_trl(task)
    rows: list[dict[str, float]] = []
    given: list[float] = []

    def reward(**columns: Any) -> list[float]:
        given[:] = rewards(**columns)
        return list(given)

    class Timed(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            rows.append({"seconds": time.perf_counter() - self.started, "reward": statistics.fmean(given)})
            print(rows[-1], file=sys.stderr, flush=True)

    config = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=KL,
        seed=seed,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        bf16=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    make: Any = GRPOTrainer
    trainer = make(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(lines),
        processing_class=tokenizer,
        callbacks=[Timed()],
        peft_config=SVFConfig(factor_dtype="bfloat16", bf16_products=True, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return expert_of(trainer.model), rows


def work(trainer: str, steps: int, seed: int) -> dict[str, Any]:
    """Trains in this process; the peak of its anonymous memory while it does."""
    memory = AnonymousPeak(interval=0.05)
    memory.start()
    task = get(TASK, **json.loads(TASK_OPTIONS))
    with tempfile.TemporaryDirectory() as folder:
        expert, rows = (trained_by_t2 if trainer == T2 else trained_by_trl)(task, Path(folder), steps, seed)
    peak = memory.peak
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False))
    svf.add_expert("trained", expert, strict=False)
    problems = task.problems("test")[:PROBLEMS]
    choices = {"base": None, "trained": "trained"}
    found = evaluate_experts(svf, choices, task, problems, tokenizer_of(tokenizer), new_tokens=TOKENS)
    accuracy = {name: each.accuracy for name, each in found.items()}
    return {"steps": rows, "peak_anonymous_bytes": peak, "accuracy": accuracy}


def trainers_table(results: Any) -> Table:
    """Accuracy, seconds a step and peak memory."""

    def trained(runs: list[dict[str, Any]]) -> str:
        found = [run["accuracy"]["trained"] for run in runs]
        return f"{statistics.fmean(found):.1%} ({', '.join(f'{100 * each:.1f}' for each in found)})"

    rows = [
        [
            name,
            f"{runs[0]['accuracy']['base']:.1%}",
            trained(runs),
            f"{statistics.median(row['seconds'] for run in runs for row in run['steps']):.1f}",
            f"{max(run['peak_anonymous_bytes'] for run in runs) / 1e9:.2f}",
        ]
        for name, runs in results["trainers"].items()
    ]
    about = results["machine"]
    return Table(
        f"SVF on sums of two numbers by rewards alone, {results['steps']} steps of {PROMPTS} prompts with {SAMPLES} "
        f"completions, {PROBLEMS} fresh problems, {about['threads']} cores of {about['processor']} "
        "(`python -m benchmarks.training.trl_grpo`):",
        ["trainer", "base", "trained, mean and each seed", "s a step", "peak anonymous, GB"],
        rows,
    )


def main(
    trainer: str | None = None,
    steps: int = 20,
    seed: int = 0,
    seeds: int = 3,
    results: Path = RESULTS / "trl-grpo.json",
) -> None:
    """Args:
    trainer: Train with this one in this process and print the figures; default both, in processes.
    steps: Of training.
    seed: Of the run in this process.
    seeds: Runs of each trainer.
    results: File for the results as JSON.
    """
    if trainer is not None:
        print(json.dumps(work(trainer, steps, seed)), flush=True)
        return
    found: dict[str, list[dict[str, Any]]] = {T2: [], TRL: []}
    for number in range(seeds):
        for name, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.training.trl_grpo", "--trainer", name]
            command += ["--steps", str(steps), "--seed", str(number)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    content = {"machine": machine(), "steps": steps, "trainers": found}
    write_results(results, content)
    trainers_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
