"""Seconds and peak memory of a training step: SVF, LoRA, SVF in TRL's trainer, and SVF the published way.

    python -m benchmarks.training.step_speed

SmolLM2-135M-Instruct, 8 prompts with 6 completions of exactly 16 tokens each, then the update with its exact KL, all in
the loop of `t2 train`, prompts with zero advantage included; TRL's GRPOTrainer has no KL here, for which it would load
a second model. Each method is a process of its own, which takes turns with SVF's. A turn is two steps of which the
second counts: the memory of a process that waited is cold. Peak memory is the process's
anonymous memory, sampled every 20 ms; the model is first copied there from its mapped file, so that the weights that a
method computes with count, and no others. Writes benchmarks/results/training-speed.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import t2
from benchmarks.common.memory import AnonymousPeak
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2.tasks import Task, get
from t2.training import Trainer, TrainOptions
from t2.weights.machine import machine

MODEL = "smollm2-135m-instruct"
TASK, TASK_OPTIONS = "reasoning-gym:chain_sum", '{"config": {"min_terms": 2, "max_terms": 2, "max_digits": 2}}'
METHODS = {
    "SVF": {"method": "svf"},
    "SVF, bfloat16 factors and products": {"method": "svf", "factor_dtype": "bfloat16", "bf16_products": True},
    "SVF, bfloat16, support of 128": {"factor_dtype": "bfloat16", "bf16_products": True, "support": 128},
    "SVF, bfloat16, support of 64": {"factor_dtype": "bfloat16", "bf16_products": True, "support": 64},
    "SVF, MLP alone": {"method": "svf", "target_modules": ("mlp",)},
    "LoRA r=16 (PEFT)": {"method": "lora"},
    "LoRA r=16 (PEFT), bfloat16 autocast": {"method": "lora", "mixed_precision": "bf16"},
    "W' built, dW' projected (published)": {"method": "dense-compose"},
}
GRPO = "SVF, bfloat16, TRL's GRPOTrainer"
PROMPTS, SAMPLES, TOKENS = 8, 6, 16


def work(name: str) -> None:
    """Runs one step for each line on standard input; prints its metrics and the peak so far as JSON."""
    memory = AnonymousPeak(interval=0.02)
    memory.start()
    model, tokenizer = t2.load(MODEL)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    task = get(TASK, **json.loads(TASK_OPTIONS))
    if name == GRPO:
        return grpo(model, tokenizer, task, memory)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainOptions(
            task=TASK,
            task_options=TASK_OPTIONS,
            output=Path(folder),
            prompts_per_step=PROMPTS,
            samples_per_prompt=SAMPLES,
            max_new_tokens=TOKENS,
            skip_zero_advantage=False,  # every step does all the work that one can have
            validate_every=10**9,
            save_every=10**9,
            steps=10**9 - 1,
            trackers=(),
            **METHODS[name],  # type: ignore[arg-type]
        )
        trainer = Trainer(model, tokenizer, task, options)
        trainer.generator = replace(trainer.generator, eos_ids=(int(tokenizer.pad_token_id) + 10**6,))
        print(json.dumps({"trainable": trainer.policy.trainable}), flush=True)
        for _ in sys.stdin:
            row = trainer.step()
            assert row["length"] == TOKENS
            print(json.dumps(row | {"peak": memory.peak}), flush=True)


def for_trl(task: Task) -> tuple[list[dict[str, Any]], Callable[..., list[float]]]:
    """A task's training problems as rows of a dataset for TRL, and the reward function that belongs to them."""
    problems = task.problems("train")

    def reward(completions: list[list[dict[str, str]]], index: list[int], **columns: object) -> list[float]:
        return task.rewards([problems[i] for i in index], [answer[0]["content"] for answer in completions])

    return [{"prompt": list(problem.messages), "index": i} for i, problem in enumerate(problems)], reward


def grpo(model: Any, tokenizer: Any, task: Task, memory: AnonymousPeak) -> None:
    """The same with TRL's trainer around the wrapped model."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False))
    svf.start_training()
    rows, reward = for_trl(task)

    class OnRequest(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds, "rollout_seconds": None, "peak": memory.peak}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=TOKENS,
            generation_kwargs={"min_new_tokens": TOKENS},
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            bf16=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        make: Any = GRPOTrainer  # annotated for transformers' own models
        trainer = make(
            model=svf,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[OnRequest()],
        )
        print(json.dumps({"trainable": svf.layout.R}), flush=True)
        trainer.train()


class Worker:
    """A method's process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.training.step_speed", "--method", name]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.trainable = self._read()["trainable"]

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError(f"the method's process ended with exit code {self.process.wait()}")

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()


def about(worker: Worker, rows: list[dict[str, float]], svf: list[dict[str, float]]) -> dict[str, Any]:
    """Figures of a method, and the median of its ratios to the steps of SVF that it took turns with."""
    return {
        "trainable": worker.trainable,
        "seconds": [row["seconds"] for row in rows],
        "rollout_seconds": [row["rollout_seconds"] for row in rows],
        "over_svf": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rows, svf, strict=True)),
        "peak_anonymous_bytes": max(row["peak"] for row in rows),
    }


def speed_table(results: Any) -> Table:
    """Seconds and peak memory of a step by method."""
    machine = results["machine"]
    rows = [
        [
            name,
            f"{found['trainable']:,}",
            f"{statistics.median(found['seconds']):.1f}",
            f"{statistics.median(found['rollout_seconds']):.1f}" if None not in found["rollout_seconds"] else "",
            f"{found['over_svf']:.2f}",
            f"{found['peak_anonymous_bytes'] / 1e6:,.0f}",
        ]
        for name, found in results["methods"].items()
    ]
    return Table(
        f"One step of SmolLM2-135M-Instruct: {results['rollouts']} answers of {results['new_tokens']} tokens and the "
        f"update with its exact KL, float32 unless it says otherwise, {machine['threads']} cores of "
        f"{machine['processor']}; in turns with SVF, medians of {results['rounds']}; weights in use are in the "
        "peak, mapped files are not (`python -m benchmarks.training.step_speed`):",
        ["method", "trainable parameters", "s a step", "of that, rollout", "this / SVF", "peak anonymous, MB"],
        rows,
    )


def main(method: str | None = None, rounds: int = 5, results: Path = RESULTS / "training-speed.json") -> None:
    """Args:
    method: Run this method in this process, one step for each line on standard input; default all, in processes.
    rounds: Turns of each method.
    results: File for the results as JSON.
    """
    if method is not None:
        return work(method)
    first, *others = [*METHODS, GRPO]
    svf, methods = Worker(first), dict[str, dict[str, Any]]()
    steps: dict[str, list[dict[str, float]]] = {first: []}
    for name in tqdm(others, desc="methods"):  # each beside SVF: all of them together do not fit into memory
        other = Worker(name)
        for _ in range(rounds):
            for worker, rows in ((svf, steps[first]), (other, steps.setdefault(name, []))):
                worker.step()
                rows.append(worker.step())
        other.process.kill()
        beside = steps[first][-rounds:]
        methods[name] = about(other, steps[name], beside)
    methods = {first: about(svf, steps[first], steps[first]), **methods}
    svf.process.kill()
    found = {
        "machine": machine(),
        "rollouts": PROMPTS * SAMPLES,
        "new_tokens": TOKENS,
        "rounds": rounds,
        "methods": methods,
    }
    write_results(results, found)
    speed_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
