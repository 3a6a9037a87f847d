"""Experts trained in three domains, and SVF against LoRA at equal rollouts, with `t2 train`.

    python -m benchmarks.training.train_experts                    # all runs, one after the other; about an hour
    python -m benchmarks.training.train_experts --only sums        # the runs whose name starts with "sums"

Finished runs are skipped, interrupted ones resume. Everything a run writes is in its folder below `runs/`. Writes
benchmarks/results/training.json, which keeps what it has of runs without a folder, and docs/training-*.png.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common.tables import RESULTS, ROOT, Table, read_results, with_interval, write_results
from t2.tasks import get
from t2.weights.machine import machine
from t2kernels.files import replacing

MODEL = "smollm2-135m-instruct"
SEEDS = (0, 1, 2)

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": ("reasoning-gym:chain_sum", {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}),
    "reading": ("reasoning-gym:needle_haystack", {"config": {"min_num_statements": 3, "max_num_statements": 6}}),
    "logic": ("reasoning-gym:syllogism", {"config": {"invalid_ratio": 0.5}}),
}
"""Three domains in which the base has some signal: arithmetic, reading, and logic with half of its solutions yes."""
DOMAINS = {
    "sums": "adding and subtracting numbers",
    "reading": "finding in some statements about people the person that is asked for",
    "logic": "whether a conclusion follows from statements",
}
PUZZLES = (
    "letter_counting",
    "spell_backward",
    "calendar_arithmetic",
    "family_relationships",
    "word_sorting",
    "time_intervals",
    "simple_geometry",
    "leg_counting",
    "caesar_cipher",
    "letter_jumble",
)
"""Tasks of reasoning-gym that stand, with general questions, for prompts outside the domains of the classifier."""
GENERAL = {"name": "jsonl:t2/banks/general-questions.jsonl", "validation_size": 30, "test_size": 50}
_BY_NAME = {domain: {"name": name, **options} for domain, (name, options) in TASKS.items()}
_PUZZLES = {"name": "mixture", "tasks": {task: {"name": f"reasoning-gym:{task}"} for task in PUZZLES}}
_ELSE = {"name": "mixture", "tasks": {"general": GENERAL, "puzzles": _PUZZLES}}
TASKS["classifier"] = "classify", {"tasks": _BY_NAME | {"others": _ELSE}, "domains": DOMAINS}
TASKS["all"] = "mixture", {"tasks": _BY_NAME}
SHARED = ("--samples-per-prompt", "8", "--kl-coefficient", "0.01", "--learning-rate", "1e-3", "--decay", "--trackers")
FACTORS = ("--factor-dtype", "bfloat16", "--bf16-products")
EXPERTS = {
    "sums": "--cold-start-steps 60 --steps 100 --prompts-per-step 64 --max-new-tokens 6 --validate-every 10",
    "reading": "--cold-start-steps 30 --steps 50 --prompts-per-step 32 --max-new-tokens 8 --validate-every 5",
    "logic": "--cold-start-steps 25 --steps 50 --prompts-per-step 32 --max-new-tokens 4 --validate-every 5",
}
OF_ALL = {
    "classifier": "--objective next-token --steps 64 --prompts-per-step 32 --learning-rate 4e-3 --validate-every 16",
    "all-lora": "--cold-start-steps 30 --steps 45 --prompts-per-step 48 --samples-per-prompt 4 --max-new-tokens 8 "
    "--validate-every 15 --method lora --cold-start-learning-rate 1e-3 --learning-rate 2e-4",
}
"""The classification expert, and one adapter for all domains, which experts are compared with."""
BANK = "t2/banks/smollm2-135m-instruct"
SUPPORTED = {
    "sums": "--learning-rate 3e-3 --cold-start-learning-rate 1.2e-2",
    "reading": "--learning-rate 3e-3 --cold-start-learning-rate 1.2e-2",
    "logic": "",
}
"""Rates of the runs on a support of few components of each matrix."""
EARLIER = "runs/{}-0/best.safetensors"
"""Experts on all components, which the supports are taken from: what they change most."""
SHARED_SUPPORT = ("--support", "128", "--support-from", BANK)
"""The components of each matrix that the experts of a bank change most: those of the next one share them."""
OF_BANK = {
    "sums": "--cold-start-learning-rate 1.2e-2 --learning-rate 3e-3",
    "reading": "--cold-start-learning-rate 2.4e-2 --learning-rate 6e-3",
    "logic": "--cold-start-learning-rate 8e-3 --learning-rate 3e-3",
}
"""Rates of the experts of a bank: those that were best in the comparison, or between two of them."""
COMPARED = "--cold-start-steps 36 --steps 48 --prompts-per-step 32 --validate-every 12"
"""Options of every run of the comparison: the same solutions, the same number of completions."""
TOKENS = {"sums": 6, "reading": 8, "logic": 4}
LORA = "--method lora --mixed-precision bf16 --lora-rank"
METHODS = {
    "svf": "",
    "support-128": "--support 128",
    "support-64": "--support 64",
    "support-32": "--support 32",
    "support-16": "--support 16",
    "support-8": "--support 8",
    "mlp": "--target-modules mlp",
    "lora-4": f"{LORA} 4",
    "lora-16": f"{LORA} 16",
}
SLOW, FAST, FASTER = ("4e-3", "1e-3"), ("8e-3", "3e-3"), ("1.2e-2", "3e-3")
HIGH, FASTEST = ("1.6e-2", "6e-3"), ("2.4e-2", "6e-3")
RATES = {
    "svf": (SLOW, FAST, HIGH),
    "support-128": (FAST, HIGH),
    "support-64": (FAST, FASTER, FASTEST),
    "support-32": (FASTER, FASTEST),
    "support-16": (FASTER, FASTEST),
    "support-8": (FASTER, FASTEST),
    "mlp": (FAST,),
    "lora-4": (("1e-3", "3e-4"),),
    "lora-16": (("1e-3", "1e-4"), ("1e-3", "3e-4"), ("2e-3", "3e-4")),
}
"""Learning rates that were tried with seed 0, of the cold start and of the rewards."""
BEST: dict[tuple[str, str], tuple[str, str]] = {
    ("sums", "svf"): FAST,
    ("reading", "svf"): FAST,
    ("logic", "svf"): FAST,
    ("reading", "lora-16"): ("2e-3", "3e-4"),
    ("reading", "support-128"): HIGH,
    ("sums", "support-64"): FASTER,
    ("reading", "support-64"): FASTEST,
}
"""Those that other seeds run at, by domain and method, where it is not the first: the best by validation."""
SEVERAL_SEEDS = ("svf", "support-128", "support-64", "lora-16")
REWARDS_ALONE = "--steps 24 --prompts-per-step 32 --validate-every 4 --max-new-tokens 12 --learning-rate 3e-3"


def compared() -> dict[str, tuple[str, list[str]]]:
    """The runs of the comparison, by compare-DOMAIN-METHOD-RATES-SEED."""
    made = {}
    for seed in SEEDS:
        for domain in DOMAINS:
            for method, own in METHODS.items():
                best = BEST.get((domain, method), RATES[method][0])
                for cold, rate in RATES[method] if seed == 0 else (best,) * (method in SEVERAL_SEEDS):
                    rates = ["--cold-start-learning-rate", cold, "--learning-rate", rate]
                    options = [*COMPARED.split(), "--max-new-tokens", str(TOKENS[domain]), *own.split(), *rates]
                    if not method.startswith("lora"):
                        options += FACTORS
                    if method.startswith("support"):
                        options += ["--support-from", EARLIER.format(domain)]
                    made[f"compare-{domain}-{method}-{cold}-{rate}-{seed}"] = domain, [*options, "--seed", str(seed)]
    return made


def runs() -> dict[str, tuple[str, list[str]]]:
    """Task and further options of each run, by name."""
    made: dict[str, tuple[str, list[str]]] = {}
    for seed in SEEDS:
        made[f"sums-{seed}"] = "sums", [*EXPERTS["sums"].split(), *FACTORS, "--seed", str(seed)]
    for name in ("reading", "logic"):
        made[f"{name}-0"] = name, [*EXPERTS[name].split(), *FACTORS]
    for name in SUPPORTED:
        chosen = ["--support", "64", "--support-from", EARLIER.format(name), *SUPPORTED[name].split()]
        made[f"{name}-support-64"] = name, [*EXPERTS[name].split(), *FACTORS, *chosen]
    made["classifier"] = "classifier", [*OF_ALL["classifier"].split(), *FACTORS]
    made["all-lora"] = "all", OF_ALL["all-lora"].split()
    for name, rates in OF_BANK.items():
        made[f"bank-{name}"] = name, [*EXPERTS[name].split(), *FACTORS, *SHARED_SUPPORT, *rates.split()]
    made["bank-classifier"] = "classifier", [*OF_ALL["classifier"].split(), *FACTORS, *SHARED_SUPPORT]
    made["rewards-alone"] = "sums", [*REWARDS_ALONE.split(), *FACTORS]
    return made | compared()


def command(task: str, options: list[str], output: Path) -> list[str]:
    name, task_options = TASKS[task]
    command = ["train", MODEL, "--task", name, "--task-options", json.dumps(task_options), "--output", str(output)]
    return [*command, *SHARED, *options]  # the last one of two counts


@functools.cache
def majority(task: str) -> float:
    """Share of test problems that the most frequent solution would get right."""
    solutions = [problem.solution for problem in get(TASKS[task][0], **TASKS[task][1]).problems("test")[:200]]
    return max(Counter(solutions).values()) / len(solutions)


def collected(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Curve and result of every finished run: those of the folder, and others as they were collected before."""
    found: dict[str, Any] = {}
    for name, (task, options) in runs().items():
        result = folder / name / "result.json"
        if not result.is_file() and name in before:
            found[name] = before[name]
        elif result.is_file():
            rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            arguments = command(task, options, Path("runs") / name)
            about = {"curve": rows, "command": " ".join(["t2", *arguments]), "majority": majority(task)}
            found[name] = json.loads(result.read_text()) | about
    return found


def plot(found: dict[str, Any], prefix: str, path: Path) -> None:
    """Plots validation accuracy and reward of the runs whose name starts with `prefix`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, run in found.items():
        if not name.startswith(prefix):
            continue
        rows = run["curve"]
        validated = [(row["step"], 100 * row["validation"]) for row in rows if row.get("validation") is not None]
        (line,) = left.plot(*zip(*validated, strict=True), marker="o", markersize=3, label=name)
        left.axhline(validated[0][1], linestyle="--", linewidth=0.8, color=line.get_color())
        rewarded = [(row["step"], row["reward"]) for row in rows if row.get("reward") is not None]
        if rewarded:
            right.plot(*zip(*rewarded, strict=True), color=line.get_color())
    left.set_ylabel("validation accuracy, % (dashed: base)")
    right.set_ylabel("mean reward of the drawn answers")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def trained_table(results: Any) -> Table:
    """One row for each expert."""
    rows = []
    for name, run in results["runs"].items():
        if name.startswith("compare-"):
            continue
        scores = [run["curve"][0]["base"], *(row["validation"] for row in run["curve"] if "validation" in row)]
        rows.append(
            [
                name,
                with_interval(run["base"]),
                f"**{with_interval(run['best'])}**",
                f"{run['best']['step']} of {run['steps']}",
                f"{run['majority']:.0%}",
                f"{max(scores):.0%}, {scores[-1]:.0%}",
                f"{run['training_seconds'] / 60:.1f}",
            ]
        )
    settings = next(iter(results["runs"].values()))
    return Table(
        f"Right answers to {settings['test_problems']} test problems with 95% intervals; base and expert with the same "
        f'storage, {settings["options"]["dtype"]}; "one answer" is what the commonest one would get right '
        "(`python -m benchmarks.training.train_experts`):",
        ["task and seed", "base", "trained", "best step", "one answer", "validation: best, last", "minutes"],
        rows,
    )


METHOD_TITLES = {
    "svf": "SVF, all components",
    "mlp": "SVF, MLP alone",
    "lora-4": "LoRA r=4 (PEFT)",
    "lora-16": "LoRA r=16 (PEFT)",
} | {f"support-{count}": f"SVF, support of {count}" for count in (128, 64, 32, 16, 8)}


def by_method(results: Any, domain: str, method: str) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The results of a method in a domain, by rates and seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for rates in RATES[method]:
        for seed in SEEDS:
            if run := results["runs"].get(f"compare-{domain}-{method}-{'-'.join(rates)}-{seed}"):
                found.setdefault(rates, {})[seed] = run
    return found


def accuracies(results: Any, domain: str, method: str) -> tuple[tuple[str, str], dict[int, dict[str, Any]]] | None:
    """The rates that were best with seed 0, by validation, and the runs at these rates by seed."""
    found = by_method(results, domain, method)
    return max(found.items(), key=lambda item: best_validation(item[1][0])) if found else None


def best_validation(run: dict[str, Any]) -> float:
    return max(row["validation"] for row in run["curve"] if row.get("validation") is not None)


def minutes(run: dict[str, Any]) -> float:
    """Minutes of all steps at their median: a run that was held up for a while is no slower."""
    cold = run["options"]["cold_start_steps"]
    seconds = [row["seconds"] for row in run["curve"] if "seconds" in row]
    return (statistics.median(seconds[:cold]) * cold + statistics.median(seconds[cold:]) * len(seconds[cold:])) / 60


def comparison_table(results: Any) -> Table:
    """One row for each method, its domains and seeds side by side."""
    rows = []
    for method, title in METHOD_TITLES.items():
        cells, spent, trainable = [], [], 0
        for domain in DOMAINS:
            found = accuracies(results, domain, method)
            if found is None:
                cells.append("")
                continue
            (cold, rate), runs = found
            each = [100 * run["best"]["accuracy"] for run in runs.values()]
            seeds = f" ({', '.join(f'{value:.1f}' for value in each)})" if len(each) > 1 else ""
            cells.append(f"**{statistics.fmean(each):.1f}%**{seeds}; {cold}, {rate}")
            spent += [minutes(run) for run in runs.values()]
            trainable = runs[0]["trainable"]
        if any(cells):
            rows.append([title, f"{trainable:,}", *cells, f"{statistics.fmean(spent):.1f}"])
    first = next(run for name, run in results["runs"].items() if name.startswith("compare-"))
    options = first["options"]
    base = ", ".join(
        f"{domain} {found[1][0]['base']['accuracy']:.1%}"
        for domain in DOMAINS
        if (found := accuracies(results, domain, "svf"))
    )
    return Table(
        f"{options['cold_start_steps']} steps of {options['prompts_per_step']} solutions, then "
        f"{options['steps'] - options['cold_start_steps']} steps of as many prompts with "
        f"{options['samples_per_prompt']} answers each; right of {first['test_problems']} test problems, mean and each "
        "seed, and the rates of both phases. "
        f"The base: {base}. Supports are what the domain's expert above changes most. Minutes of training are those of "
        "one thread, two runs side by side:",
        ["method", "trainable parameters", *DOMAINS, "minutes"],
        rows,
    )


def rates_table(results: Any) -> Table:
    """The rates that were tried, with seed 0: best validation score and test."""
    rows = []
    for method, title in METHOD_TITLES.items():
        if len(RATES[method]) > 1:
            for rates in RATES[method]:
                runs = [by_method(results, domain, method).get(rates, {}).get(0) for domain in DOMAINS]
                cells = [f"{best_validation(r):.0%}, {r['best']['accuracy']:.1%}" if r else "" for r in runs]
                rows.append([title, *rates, *cells])
    return Table(
        "Rates tried with seed 0: best validation of 100 problems, test of 200:",
        ["method", "cold start", "rewards", *DOMAINS],
        rows,
    )


def main(only: str = "", folder: Path = ROOT / "runs", collect: bool = False) -> None:
    """Args:
    only: Train only runs whose name starts with this.
    folder: Folder of the runs.
    collect: Train nothing; write results of the finished runs.
    """
    for name, (task, options) in runs().items():
        output = folder / name
        if collect or not name.startswith(only) or (output / "result.json").is_file():
            continue
        again = ["--resume"] if (output / "checkpoint.safetensors").is_file() else []
        print(name, flush=True)
        trained = [sys.executable, "-m", "t2", *command(task, options, output.resolve()), *again]
        subprocess.run(trained, check=True, cwd=ROOT)
    before = read_results("training.json")["runs"] if (RESULTS / "training.json").is_file() else {}
    found = collected(folder, before)
    results = {"machine": machine(), "runs": found}
    write_results(RESULTS / "training.json", results)
    for prefix in ("sums", "reading", "logic"):
        if any(name.startswith(prefix) for name in found):
            plot(found, prefix, ROOT / "docs" / f"training-{prefix}.png")
    trained_table(results).show()


if __name__ == "__main__":
    tyro.cli(main)
