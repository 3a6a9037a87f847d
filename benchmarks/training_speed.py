"""Seconds and peak memory of a training step: SVF, LoRA, and SVF the published way.

    python benchmarks/training_speed.py

SmolLM2-135M-Instruct, 8 prompts with 6 answers of exactly 16 tokens each, then the update with its exact KL, all in the
loop of `t2 train`, prompts without an advantage included. Each method is a process of its own; they take turns, and
start anew every round. A turn is two steps of which the second counts: the memory of a process that waited is cold.
Peak memory is the process's anonymous memory, sampled every 20 ms; the model is copied there from its mapped file
first, so that the weights that a method computes with count, and no others. Writes
benchmarks/results/training-speed.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2
from benchmarks.memory import AnonymousPeak
from t2.tasks import get
from t2.training import Trainer, TrainOptions
from t2.weights.machine import machine

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"
TASK, TASK_OPTIONS = "reasoning-gym:chain_sum", '{"config": {"min_terms": 2, "max_terms": 2, "max_digits": 2}}'
METHODS = {
    "SVF": {"method": "svf"},
    "SVF, bfloat16 factors and products": {"method": "svf", "factor_dtype": "bfloat16", "bf16_products": True},
    "SVF, MLP alone": {"method": "svf", "target_modules": ("mlp",)},
    "LoRA r=16 (PEFT)": {"method": "lora"},
    "W' built, dW' projected (published)": {"method": "dense-compose"},
}
PROMPTS, SAMPLES, TOKENS = 8, 6, 16


def work(name: str) -> None:
    """Answers each line on standard input with a step's metrics and the peak so far, as JSON."""
    memory = AnonymousPeak(interval=0.02)
    memory.start()
    model, tokenizer = t2.load(MODEL)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    task = get(TASK, **json.loads(TASK_OPTIONS))
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
        trainer.generator = replace(trainer.generator, ends=(int(tokenizer.pad_token_id) + 10**6,))
        print(json.dumps({"trainable": trainer.policy.trainable}), flush=True)
        for _ in sys.stdin:
            row = trainer.step()
            assert row["length"] == TOKENS
            print(json.dumps(row | {"peak": memory.peak}), flush=True)


class Worker:
    """A method's process."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--method", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.trainable = self._read()["trainable"]

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise RuntimeError(f"the method's process ended with exit code {self.process.wait()}")

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()


def main(method: str | None = None, rounds: int = 5) -> None:
    """Args:
    method: Runs this one in this process, a step for each line on standard input; by default all run.
    rounds: Turns of each method.
    """
    if method is not None:
        return work(method)
    workers = {name: Worker(name) for name in tqdm(METHODS, desc="loading")}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    names = list(METHODS)
    for turn in tqdm(range(rounds), desc="rounds"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            workers[name].step()
            steps[name].append(workers[name].step())
    table = Table("method", "numbers learnt", "s a step", "of it answers", "this / SVF", "peak, MB")
    results: dict[str, object] = {}
    for name in names:
        rows = steps[name]
        seconds = [row["seconds"] for row in rows]
        ratio = statistics.median(
            row["seconds"] / ours["seconds"] for row, ours in zip(rows, steps["SVF"], strict=True)
        )
        results[name] = {
            "trainable": workers[name].trainable,
            "seconds": seconds,
            "rollout_seconds": [row["rollout_seconds"] for row in rows],
            "over_svf": ratio,
            "peak_anonymous_bytes": max(row["peak"] for row in rows),
        }
        table.add_row(
            name,
            f"{workers[name].trainable:,}",
            f"{statistics.median(seconds):.1f}",
            f"{statistics.median(row['rollout_seconds'] for row in rows):.1f}",
            f"{ratio:.2f}",
            f"{max(row['peak'] for row in rows) / 1e6:,.0f}",
        )
        workers[name].process.kill()
    Console().print(table)
    figures = {
        "machine": machine(),
        "rollouts": PROMPTS * SAMPLES,
        "new_tokens": TOKENS,
        "rounds": rounds,
        "methods": results,
    }
    (RESULTS / "training-speed.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
