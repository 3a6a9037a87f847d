"""Bank of experts that ships with the package, made from the runs of `benchmarks.training.train_experts`.

    python -m benchmarks.training.make_bank

Writes t2/banks/smollm2-135m-instruct: for each domain the expert of the seed with the best validation score, the
classification expert, z in float16; domains.json and tasks.json; and a model card with data, commands, curves and
scores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.common.tables import ROOT, Table, with_interval
from benchmarks.training.train_experts import DOMAINS, MODEL, PUZZLES, TASKS, command, runs
from t2.adaptation.bank_folder import FORMAT, FORMAT_VERSION
from t2.experts.expert import Expert
from t2.weights.files import atomic_directory
from t2kernels.files import write_text

CARD = """# Experts for SmolLM2-135M-Instruct

One vector z for each domain, {numbers:,} numbers in float16 (`t2.load("smollm2-135m-instruct")`, all linear layers;
Apache-2.0, as the model). `domains.json` tells what each expert is for, `tasks.json` what it was trained on.

    t2 generate {model} --bank {model} --adapt classifier --prompt "State the final answer: 17 + 25 ="

{scores}

Right answers to {test} test problems each, with 95% intervals; the classification expert's are the names of categories
that it says, of {labels}. Data: procedural tasks of [reasoning-gym](https://github.com/open-thought/reasoning-gym)
(Apache-2.0), made from seeds; test prompts are in no other split. The category "others" was trained on questions of all
kinds (`benchmarks/general-questions.jsonl`) and {puzzles}.
Answers are short, in the form of the data; experts do nothing for prompts of other kinds, and the base's limits stay.

Trained, from the repository's root, by

{commands}

{curves}
"""


def best_run(folder: Path, domain: str) -> tuple[str, dict[str, Any]]:
    """Name and result of a domain's finished run with the best validation score."""
    found = {}
    for name, (task, _) in runs().items():
        result = folder / name / "result.json"
        if task == domain and not name.startswith("compare-") and result.is_file():
            rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            score = max(row["validation"] for row in rows if row.get("validation") is not None)
            found[name] = score, json.loads(result.read_text())
    if not found:
        raise FileNotFoundError(f"folder: expected a finished run of {domain} in {folder}, got none")
    name = max(found, key=lambda each: found[each][0])
    return name, found[name][1]


def main(folder: Path = ROOT / "runs") -> None:
    """Args:
    folder: Folder of the runs.
    """
    bank = ROOT / "t2" / "banks" / MODEL
    chosen = {name: best_run(folder, name) for name in (*DOMAINS, "classifier")}
    commands = {
        name: " ".join(["t2", *(_quoted(a) for a in command(*runs()[run], Path("runs") / run))])
        for name, (run, _) in chosen.items()
    }
    shutil.rmtree(bank, ignore_errors=True)
    bank.parent.mkdir(exist_ok=True)
    with atomic_directory(bank) as new:
        for name, (run, result) in chosen.items():
            expert = Expert.load(folder / run / "best.safetensors")
            about = {"command": commands[name], "description": DOMAINS.get(name, "tells domains apart")}
            about |= {key: text for key, text in expert.metadata.items() if key == "domains"}
            scores = {key: json.dumps(result[key]) for key in ("base", "best", "test_problems")}
            Expert(expert.z, expert.layout, about | scores).save(new / f"{name}.safetensors", torch.float16)
            shutil.copy(folder / run / "curve.png", new / f"{name}.png")
        described = {"format": FORMAT, "format_version": FORMAT_VERSION, "domains": DOMAINS}
        write_text(new / "domains.json", json.dumps(described, indent=1) + "\n")
        tasks = {name: {"name": TASKS[name][0], **TASKS[name][1]} for name in DOMAINS}
        write_text(new / "tasks.json", json.dumps(tasks, indent=1) + "\n")
        rows = [
            [
                name,
                with_interval(result["base"]),
                with_interval(result["best"]),
                run.rpartition("-")[2] if "-" in run else "0",
            ]
            for name, (run, result) in chosen.items()
        ]
        card = CARD.format(
            model=MODEL,
            numbers=expert.layout.R,
            test=chosen["sums"][1]["test_problems"],
            scores=Table(head=["expert", "base", "expert", "seed"], rows=rows).markdown(),
            labels=", ".join((*DOMAINS, "others")),
            puzzles=", ".join(PUZZLES),
            commands="\n\n".join(f"    {line}" for line in commands.values()),
            curves="\n".join(f"![training of {name}]({name}.png)" for name in chosen),
        )
        write_text(new / "README.md", card)


def _quoted(argument: str) -> str:
    return f"'{argument}'" if set(argument) & set(" {}\"'") else argument


if __name__ == "__main__":
    tyro.cli(main)
