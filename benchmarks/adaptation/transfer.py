"""Experts on other bases than their own: singular positions in order, shuffled, and the base alone.

    python -m benchmarks.adaptation.transfer runs/sums-svf-0/best.safetensors runs/letters-svf-0/best.safetensors

The bases are copies of SmolLM2-135M-Instruct with noise in the weights, or quantised in other ways; and the models that
`--others` names (any that `t2.load` takes). Each expert is judged on the task that it was trained for, by the options
in its file. Beside the scores: how well the singular vectors of both bases line up, and the cosine between the weight
changes that an expert makes on its own base and on the other.

Writes benchmarks/results/transfer.json, after every base and expert, and docs/transfer.png. An interrupted run resumes
where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2 import tasks
from t2.eval.transfer import measure
from t2.experts.layout import layout_of
from t2.experts.transfer import Alignment, TransferOptions, match, transfer
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.files import raw_bytes
from t2.weights.machine import machine
from t2.weights.targets import plain_targets, weight_matrix
from t2kernels import Factors
from t2kernels.files import replacing

MODEL = "smollm2-135m-instruct"
NEAR = 8
"""Positions to either side that count as near."""
PARTS = 8
"""Into which positions are divided, from the largest singular values to the smallest."""
LENIENT = TransferOptions(unmatched="base")

Change = Callable[[Tensor, torch.Generator], Tensor]


def with_noise(weight: Tensor, generator: torch.Generator, *, size: float) -> Tensor:
    """The weight plus Gaussian noise of `size` times its Frobenius norm."""
    noise = torch.randn(weight.shape, generator=generator)
    return weight + noise * (size * weight.norm() / noise.norm())


def quantised(weight: Tensor, generator: torch.Generator, *, bits: int, group: int | None) -> Tensor:
    """Rounded to signed integers with a scale for each `group` neighbours in a row (None: each row), and back."""
    groups = weight.reshape(-1, group or weight.shape[1])
    largest = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(1, keepdim=True) / largest).clamp_(min=torch.finfo(weight.dtype).tiny)
    return ((groups / scale).round_().clamp_(-largest, largest) * scale).reshape(weight.shape)


COPIES: dict[str, tuple[Change, int]] = {
    "itself": (lambda weight, generator: weight, 0),
    "int8, rows": (partial(quantised, bits=8, group=None), 0),
    "int4, groups of 32": (partial(quantised, bits=4, group=32), 0),
    **{
        f"{size:.0%} noise, seed {seed}": (partial(with_noise, size=size), seed)
        for size in (0.01, 0.05, 0.2)
        for seed in (0, 1)
    },
}
"""Each copy's change of the weights, and its seed."""


@torch.no_grad()
def make_base(name: str) -> tuple[t2.SVFModel, Any]:
    """A copy by its name in COPIES, or a model by the name that `t2.load` takes; and its tokenizer."""
    model, tokenizer = t2.load(MODEL if name in COPIES else name)
    if name in COPIES:
        change, seed = COPIES[name]
        generator = torch.Generator().manual_seed(seed)
        for layer in plain_targets(model, "all-linear").values():
            weight = weight_matrix(layer)
            weight.copy_(change(weight, generator))
    return t2.SVFModel(model, t2.SVFConfig(cache=name == "itself")), tokenizer


class Experts:
    """The files' experts by name, with the tasks that their training had, and the factors of their base."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.experts: dict[str, t2.Expert] = {}
        self.tasks: dict[str, tasks.Task] = {}
        self.settings: dict[str, Any] = {}
        for file in files:
            name, expert = file.parent.name if file.stem in ("best", "last") else file.stem, t2.Expert.load(file)
            options = json.loads(expert.metadata.get("options", "{}"))
            if "task" not in options or name in self.experts:
                raise ValueError(f"experts: expected files of different runs of t2 train, got {file}")
            self.experts[name] = expert
            self.tasks[name] = tasks.get(options["task"], **json.loads(options["task_options"]))
            self.settings[name] = {
                "sha256": hashlib.sha256(raw_bytes(expert.z)).hexdigest(),
                "step": int(expert.metadata["step"]),
                **{key: options[key] for key in ("task", "task_options", "objective", "prompts_per_step")},
            }
        model, _ = t2.load(MODEL)
        weights = {name: weight_matrix(layer) for name, layer in plain_targets(model, "all-linear").items()}
        self.cache = FactorCache()
        self.keys = {name: done.key for name, done in decompose_weights(weights, self.cache).items()}
        layout = layout_of(model, weights, self.keys)
        for name, expert in self.experts.items():
            layout.check_same(expert.layout, f"expert {name!r}")
        self.layout = layout

    def factors(self, name: str) -> Factors:
        return self.cache.load(self.keys[name])


def line_up(source: Experts, target: t2.SVFModel) -> dict[str, Any] | None:
    """Agreement of both bases' singular vectors and of each expert's weight changes; None if shapes differ.

    "vectors": by kind of matrix, "same" and "near" of `Alignment` in PARTS parts of all positions, and
    "same_chance", that of unrelated weights. "changes": the cosine of the weight change that an expert makes on its own
    base and the one it makes on the other, over all matrices, ordered and shuffled.
    """
    moved = {
        (name, condition): transfer(expert, target.layout, LENIENT, shuffle_seed=seed)
        for name, expert in source.experts.items()
        for condition, seed in (("ordered", None), ("shuffled 0", 0))
    }
    kinds: dict[str, dict[str, list[Tensor]]] = {}
    products, own, others = (dict.fromkeys(moved, 0.0) for _ in range(3))
    for name, theirs in tqdm(match(source.layout, target.layout).sources.items(), desc="alignment", unit="matrix"):
        if theirs is None:
            continue
        module: Any = target.model.get_submodule(name)
        mine, factors = Factors(*module.weight.factors()), source.factors(theirs)
        if (mine.u.shape, mine.vh.shape) != (factors.u.shape, factors.vh.shape):
            return None
        found = Alignment.of(factors, mine)
        parts = kinds.setdefault(name.rpartition(".")[2], {"same": [], "near": [], "same_chance": []})
        parts["same"].append(torch.stack([part.mean() for part in found.same.tensor_split(PARTS)]))
        parts["near"].append(torch.stack([part.mean() for part in found.near(NEAR).tensor_split(PARTS)]))
        sides = torch.tensor([len(mine.u), mine.vh.shape[1]])
        parts["same_chance"].append((2 / (math.pi * sides)).sqrt().mean())
        for key, expert in moved.items():
            change, change_here = factors.s * (source.experts[key[0]][theirs] - 1), mine.s * (expert[name] - 1)
            products[key] += float(found.products(change, change_here))
            own[key] += float(change.square().sum())
            others[key] += float(change_here.square().sum())
    changes: dict[str, dict[str, float | None]] = {}
    for name, condition in moved:
        norm = math.sqrt(own[name, condition] * others[name, condition])
        changes.setdefault(name, {})[condition] = products[name, condition] / norm if norm else None
    vectors = {
        kind: {key: torch.stack(each).mean(0).tolist() for key, each in parts.items()} for kind, parts in kinds.items()
    }
    return {"vectors": vectors, "changes": changes}


def plot(results: Mapping[str, Any], path: Path) -> None:
    """For each expert the accuracy by base, with 95% intervals; below, how singular vectors line up by position."""
    from matplotlib.figure import Figure

    bases, names = results["bases"], list(results["settings"]["experts"])
    figure = Figure(figsize=(12, 3.2 * (len(names) + 1)), layout="constrained")
    panels = figure.subplots(len(names) + 1, 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=False):
        finished = [base for base, found in bases.items() if name in found["experts"]]
        conditions = list(bases[finished[0]]["experts"][name]["conditions"]) if finished else []
        width = 0.8 / max(1, len(conditions))
        for column, condition in enumerate(conditions):
            rows = [bases[base]["experts"][name]["conditions"][condition] for base in finished]
            share = [100 * row["accuracy"] for row in rows]
            below = [100 * (row["accuracy"] - row["interval"][0]) for row in rows]
            above = [100 * (row["interval"][1] - row["accuracy"]) for row in rows]
            colour = {"base": "tab:gray", "ordered": "tab:blue"}.get(condition, "tab:orange")
            label = condition.partition(" ")[0] if column < 3 else None
            places = [place + (column - (len(conditions) - 1) / 2) * width for place in range(len(finished))]
            axes.bar(
                places,
                share,
                0.9 * width,
                yerr=[below, above],
                color=colour,
                ecolor="black",
                error_kw={"linewidth": 0.8},
                label=label,
            )
        axes.set(title=f"{name}: {results['settings']['experts'][name]['task']}", ylabel="right, % (95% intervals)")
        axes.set_xticks(range(len(finished)), finished, fontsize=8)
        axes.grid(alpha=0.3, axis="y")
    panels[0].legend(fontsize=8)
    bottom = panels[-1]
    for base, found in bases.items():
        if found["lines_up"] is None:
            continue
        vectors = [kind["same"] for kind in found["lines_up"]["vectors"].values()]
        middles = [100 * (part + 0.5) / PARTS for part in range(PARTS)]
        bottom.plot(middles, torch.tensor(vectors).mean(0), marker="o", markersize=3, label=base)
    bottom.set(
        title="singular vectors of the model and of the base, mean over kinds of matrices",
        xlabel="position, % of the rank; the largest singular values on the left",
        ylabel="|u_i . u'_i|, |v_i . v'_i|",
        ylim=(0, 1.05),
    )
    bottom.grid(alpha=0.3)
    bottom.legend(fontsize=8, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def transfer_table(results: Mapping[str, Any]) -> Table:
    """Accuracy of every expert on every base, and how the two bases line up."""
    settings, rows = results["settings"], []

    def cell(found: Mapping[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"

    for name, (base, found) in itertools.product(settings["experts"], results["bases"].items()):
        if name not in found["experts"]:
            continue
        conditions = dict(found["experts"][name]["conditions"])
        scores = [cell(conditions.pop(key)) for key in ("base", "ordered")]
        scores.append(", ".join(f"{each['accuracy']:.1%}" for each in conditions.values()))
        alignment = ["", "", ""]
        if lines_up := found["lines_up"]:
            kinds = lines_up["vectors"].values()
            means = [statistics.mean(statistics.mean(kind[key]) for kind in kinds) for key in ("same", "near")]
            alignment = [f"{value:.2f}" for value in (*means, lines_up["changes"][name]["ordered"])]
        rows.append([f"{name}, {base}", *scores, *alignment])
    trained = "; ".join(
        f"{name} on {each['task']}, {each['objective']} objective, {each['step']} steps of "
        f"{each['prompts_per_step']} prompts"
        for name, each in settings["experts"].items()
    )
    bases = " ".join(json.dumps(base) for base in results["bases"])
    return Table(
        f"Experts of {settings['model']} on {settings['problems']} test problems ({trained}), right answers with 95% "
        f"intervals (`python -m benchmarks.adaptation.transfer EXPERT ... --problems {settings['problems']} --shuffles "
        f"{settings['shuffles']} --bases {bases}`):",
        ["expert, base", "base alone", "ordered", "shuffled, each", "same vectors", "near", "same change"],
        rows,
    )


def resumed(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Results so far in the file, none if it does not exist; ValueError if its settings differ."""
    if not path.exists():
        return {"machine": machine(), "settings": settings, "bases": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["settings"] != settings:
        raise ValueError(f"results: {path} was made with {found['settings']}, now asked for {settings}; delete it")
    return found


def main(
    experts: tyro.conf.Positional[tuple[Path, ...]],
    bases: tuple[str, ...] = tuple(COPIES),
    others: tuple[str, ...] = (),
    problems: int = 200,
    shuffles: int = 3,
    results: Path = RESULTS / "transfer.json",
    figure: Path = ROOT / "docs" / "transfer.png",
) -> None:
    """Args:
    experts: Expert files that t2 train wrote.
    bases: Copies to measure.
    others: Other models: aliases, Hub ids, folders or GGUF files.
    problems: Problems of each test split.
    shuffles: Number of shuffled controls.
    results: File for the results as JSON.
    figure: File for the plot.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if unknown := set(bases) - set(COPIES):
        raise ValueError(f"bases: expected some of {list(COPIES)}, got {sorted(unknown)}")
    source = Experts(experts)
    settings = {"model": MODEL, "problems": problems, "shuffles": shuffles, "experts": source.settings}
    found = resumed(results, settings)
    for base in (*bases, *others):
        done = found["bases"].get(base, {"experts": {}})
        if set(done["experts"]) == set(source.experts):
            continue
        print(base, flush=True)
        svf, tokenizer = make_base(base)
        if "lines_up" not in done:
            done["lines_up"] = line_up(source, svf)
        for name, expert in source.experts.items():
            if name not in done["experts"]:
                seeds = range(shuffles)
                task = source.tasks[name]
                done["experts"][name] = measure(
                    svf, expert, task, tokenizer, LENIENT, problems=problems, shuffle_seeds=seeds
                )
                found["bases"][base] = done
                write_results(results, found)
        del svf
    plot(found, figure)
    transfer_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
