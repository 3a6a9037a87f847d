"""Bank of experts that ships with the package, made from the runs of `benchmarks.training.train_experts`.

    python -m benchmarks.training.make_bank

Writes t2/banks/smollm2-135m-instruct: the expert of each domain and the classification expert, all on one support, z in
float16; domains.json and tasks.json; and a model card with data, commands, curves and
scores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import tyro

from benchmarks.common.tables import ROOT, Table, with_interval
from benchmarks.training.train_experts import DOMAINS, MODEL, PUZZLES, TASKS, command, runs
from t2.adaptation.bank_edit import add_prompts
from t2.adaptation.bank_folder import FORMAT, FORMAT_VERSION
from t2.experts.expert import Expert
from t2.experts.support import support_of
from t2.tasks import get
from t2.tasks.classify import OTHERS
from t2.weights.files import atomic_directory
from t2kernels.files import write_text

CARD = """# Experts for SmolLM2-135M-Instruct

One vector z for each domain, {numbers:,} numbers in float16 (`t2.load("smollm2-135m-instruct")`, all linear layers;
Apache-2.0, as the model). All but {support:,} of them are 1: the experts share one support, and the delta form,
`SVFConfig(form="delta", support=THIS FOLDER)`, runs them at little more than the base's cost. `domains.json` tells what
each expert is for, `tasks.json` what it was trained on.

    t2 generate {model} --bank {model} --adapt classifier --prompt "State the final answer: 17 + 25 ="

{scores}

Right answers to {test} test problems each, with 95% intervals; the classification expert's are the names of categories
that it says, of {labels}. Data: procedural tasks of [reasoning-gym](https://github.com/open-thought/reasoning-gym)
(Apache-2.0), made from seeds; test prompts are in no other split. The category "others" was trained on questions of all
kinds (`t2/banks/general-questions.jsonl`) and {puzzles}.
Answers are short, in the form of the data; experts do nothing for prompts of other kinds, and the base's limits stay.

Trained, from the repository's root, by

{commands}

{curves}
"""


def main(folder: Path = ROOT / "runs") -> None:
    """Args:
    folder: Folder of the runs.
    """
    bank = ROOT / "t2" / "banks" / MODEL
    chosen = {name: f"bank-{name}" for name in (*DOMAINS, "classifier")}
    found = {name: json.loads((folder / run / "result.json").read_text()) for name, run in chosen.items()}
    commands = {
        name: " ".join(["t2", *(_quoted(a) for a in command(*runs()[run], Path("runs") / run))])
        for name, run in chosen.items()
    }
    experts: list[Expert] = []
    shutil.rmtree(bank, ignore_errors=True)
    bank.parent.mkdir(exist_ok=True)
    with atomic_directory(bank) as new:
        for name, run in chosen.items():
            expert = Expert.load(folder / run / "best.safetensors")
            about = {"command": commands[name], "description": DOMAINS.get(name, "tells domains apart")}
            about |= {key: text for key, text in expert.metadata.items() if key == "domains"}
            scores = {key: json.dumps(found[name][key]) for key in ("base", "best", "test_problems")}
            experts.append(expert)
            Expert(expert.z, expert.layout, about | scores).save(new / f"{name}.safetensors", torch.float16)
            shutil.copy(folder / run / "curve.png", new / f"{name}.png")
        described = {"format": FORMAT, "format_version": FORMAT_VERSION, "domains": DOMAINS}
        write_text(new / "domains.json", json.dumps(described, indent=1) + "\n")
        tasks = {name: {"name": TASKS[name][0], **TASKS[name][1]} for name in DOMAINS}
        write_text(new / "tasks.json", json.dumps(tasks, indent=1) + "\n")
        rows = [[name, *(with_interval(result[key]) for key in ("base", "best"))] for name, result in found.items()]
        card = CARD.format(
            model=MODEL,
            numbers=expert.layout.R,
            support=len(support_of(experts)),
            test=found["sums"]["test_problems"],
            scores=Table(head=["expert", "base", "expert"], rows=rows).markdown(),
            labels=", ".join((*DOMAINS, "others")),
            puzzles=", ".join(PUZZLES),
            commands="\n\n".join(f"    {line}" for line in commands.values()),
            curves="\n".join(f"![training of {name}]({name}.png)" for name in chosen),
        )
        write_text(new / "README.md", card)
        keep_prompts(new)


def keep_prompts(bank: Path) -> None:
    """Puts prompts of each domain, and of what the base answers, into a bank, as `t2 bank train-classifier` wants."""
    for name in DOMAINS:
        add_prompts(bank, name, get(TASKS[name][0], **TASKS[name][1]))
    _, options = TASKS["classifier"]
    others = dict(options["tasks"]["others"])
    add_prompts(bank, OTHERS, get(others.pop("name"), **others))


def _quoted(argument: str) -> str:
    return f"'{argument}'" if set(argument) & set(" {}\"'") else argument


if __name__ == "__main__":
    tyro.cli(main)
