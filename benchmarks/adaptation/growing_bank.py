"""Two more domains for the bank that ships: what its classification expert gets right before and after each.

    python -m benchmarks.adaptation.growing_bank

A copy of the bank gets a fourth and a fifth domain by `t2 bank add`, and after each a classification expert by `t2
bank train-classifier`. The labels are asked for prompts that no training saw, 60 of each domain. Experts of the new
domains play no part in this and are drawn at random. Writes benchmarks/results/growing-bank.json.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common.tables import RESULTS, Table, write_results
from t2.adaptation.bank_command import dispatch_accuracy
from t2.adaptation.bank_folder import bank_path
from t2.cli.app import main as t2_main
from t2.experts.expert import Expert
from t2.weights.machine import machine

MODEL = "smollm2-135m-instruct"
NEW = {
    "spelling": ("reasoning-gym:spell_backward", "spelling a word backwards"),
    "divisors": ("reasoning-gym:gcd", "the greatest common divisor of numbers"),
}


def run(*arguments: str | Path) -> None:
    try:
        t2_main([str(argument) for argument in arguments])
    except SystemExit as stop:
        if stop.code:
            raise


def growing_table(results: Any) -> Table:
    """Right labels by domain, before and after each addition."""
    labels = list(results["stages"][-1]["accuracy"])
    rows = []
    for stage in results["stages"]:
        found = stage["accuracy"]
        cells = [f"{found[label]:.0%}" if label in found else "" for label in labels]
        rows.append([stage["name"], *cells, f"{stage['seconds'] / 60:.0f}" if stage["seconds"] else ""])
    return Table(
        "Right labels of 60 unseen prompts of each domain, with a fourth and a fifth domain added to the bank that "
        "ships (`python -m benchmarks.adaptation.growing_bank`):",
        ["classification expert", *labels, "minutes of training"],
        rows,
    )


def main(results: Path = RESULTS / "growing-bank.json") -> None:
    """Args:
    results: File for the results as JSON.
    """
    stages: list[dict[str, Any]] = []

    def measure(name: str, folder: Path, seconds: float) -> None:
        classifier = Expert.load(folder / "classifier.safetensors")
        found = dispatch_accuracy(MODEL, {name: classifier}, folder)[name]
        stages.append({"name": name, "accuracy": found, "seconds": seconds})

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "bank"
        run("bank", "init", folder, "--copy-of", bank_path(MODEL))
        measure("as shipped", folder, 0.0)
        for seed, (domain, (task, description)) in enumerate(NEW.items()):
            expert = Expert.load(folder / "sums.safetensors")
            path = Path(parent) / f"{domain}.safetensors"
            Expert.random(expert.layout, std=0.02, seed=seed).save(path)
            run("bank", "add", folder, "--name", domain, "--expert", path, "--description", description, "--task", task)
            measure(f"as before, with {domain} in the bank", folder, 0.0)
            start = time.perf_counter()
            run("bank", "train-classifier", MODEL, folder, "--output", Path(parent) / f"run-{domain}")
            measure(f"trained with {domain}", folder, time.perf_counter() - start)
    content = {"machine": machine(), "stages": stages}
    write_results(results, content)
    growing_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
