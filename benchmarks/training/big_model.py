"""A large model's shapes from shards to a training step on a small machine, against `t2 estimate`.

    python -m benchmarks.training.big_model                       # Llama-3-8B, stacks of 1 and 3 layers
    python -m benchmarks.training.big_model --model qwen3-30b-a3b --layers 1 2
    python -m benchmarks.training.big_model --vocabulary 4096

Makes sharded checkpoints of random bfloat16 weights, decomposes one layer's matrices straight from the shards, then
loads each stack with int8 factors and takes a step of REINFORCE through the trainer's own code, with and without
gradient checkpointing. The layers of a stack are copies of one, so the cache computes its factors once. Each phase is a
process of its own; its peak is anonymous memory, above that of a process that only imports. Embeddings stay mapped from
their files, so plans leave them out. The whole model is extrapolated from what a layer adds. A mixture's checkpoint has
a tensor for each expert's matrix, as published ones have. Takes minutes. Writes benchmarks/results/big-model-NAME.json,
and the plans of benchmarks/configs/ beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

import t2
from benchmarks.common.memory import AnonymousPeak
from benchmarks.common.random_task import Parity, word_tokenizer
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2.model.serving_plan import cost_model
from t2.training import Trainer, TrainOptions
from t2.training.policies import svf_config
from t2.weights.estimate import ModelEstimate, estimate_model
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.machine import machine
from t2.weights.memory_model import ACTIVATIONS_OF, Rates
from t2.weights.shards import INDEX
from t2.weights.step_sizes import StepSizes
from t2.weights.streaming import skeleton, target_weights
from t2kernels.files import write_text

CONFIGS = ROOT / "benchmarks" / "configs"
WORK = StepSizes(prompt_tokens=128, new_tokens=64, prompts_per_step=2, samples_per_prompt=4)


def config(model: str, layers: int | None = None, vocabulary: int | None = None) -> PretrainedConfig:
    """A model of benchmarks/configs/, with other numbers of layers and words."""
    changes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    known = json.loads((CONFIGS / f"{model}.json").read_text()) | {k: v for k, v in changes.items() if v is not None}
    found: PretrainedConfig = AutoConfig.for_model(**known, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return found


def stored(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A tensor as a published checkpoint has it: experts one by one, gate and up apart."""
    if len(shape) < 3:
        return {name: shape}
    block, _, kind = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    count, rows, columns = shape
    own = rows // len(parts), columns
    return {f"{block}.{expert}.{part}.weight": own for expert in range(count) for part in parts}


def make(folder: Path, settings: PretrainedConfig) -> None:
    """Writes a checkpoint of random weights: a shard for each layer and one for the rest, one at a time."""
    folder.mkdir()
    settings.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in skeleton(settings, torch.bfloat16).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {}).update(stored(name, tuple(parameter.shape)))
    for file, shapes in shards.items():
        torch.manual_seed(0)  # so that layers are copies of each other
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, dtype=torch.bfloat16).mul_(0.02)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    index = {name: file for file, shapes in shards.items() for name in shapes}
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": index}))
    word_tokenizer(settings.vocab_size).save_pretrained(folder)


# Phases: each runs in a process of its own and returns its measurements


def only_imports(folder: Path, peak: AnonymousPeak) -> dict[str, Any]:
    return {"peak": peak.now()}


def decompose(folder: Path, peak: AnonymousPeak) -> dict[str, Any]:
    weights = target_weights(folder, "all-linear", dtype=torch.bfloat16)
    done = decompose_weights(weights, FactorCache(), progress=False)
    seconds: dict[str, list[float]] = {}
    for name, entry in done.items():
        seconds.setdefault("x".join(map(str, weights[name].shape)), []).append(entry.seconds)
    error = max(entry.error for entry in done.values())
    return {"peak": peak.peak, "seconds": seconds, "largest_error": error}


def options(folder: Path, checkpointing: bool) -> TrainOptions:
    return TrainOptions(
        task="parity",
        output=folder / "run",
        prompts_per_step=WORK.prompts_per_step,
        samples_per_prompt=WORK.samples_per_prompt,
        factor_dtype="int8",
        model_dtype="bfloat16",
        gradient_checkpointing=checkpointing,
        skip_zero_advantage=False,
        trackers=(),
    )


def train(folder: Path, peak: AnonymousPeak, *, checkpointing: bool) -> dict[str, Any]:
    knobs = options(folder, checkpointing)
    svf, tokenizer = t2.load_factored(folder, svf_config(knobs), dtype=torch.bfloat16)
    loading, loaded = peak.peak, peak.now()
    trainer = Trainer(svf, tokenizer, Parity(WORK, words=1000), knobs)
    cost_model()  # measured at its first use, which is no part of a step
    peak.peak = 0
    start = time.perf_counter()
    groups, row = trainer._drawn()
    answered, drawing = time.perf_counter(), peak.peak
    peak.peak = 0
    row |= trainer._update(groups)
    return {
        "loading_peak": loading,
        "loaded": loaded,
        "rollout_peak": drawing,
        "update_peak": peak.peak,
        "factors": sum(target.layer.weight.nbytes for target in svf.decomposed.layers.values()),
        "rollout_seconds": answered - start,
        "update_seconds": time.perf_counter() - answered,
        "reward": row["reward"],
        "gradient_norm": row["gradient_norm"],
    }


PHASES: dict[str, Callable[[Path, AnonymousPeak], dict[str, Any]]] = {
    "imports": only_imports,
    "decompose": decompose,
    "train": lambda folder, peak: train(folder, peak, checkpointing=False),
    "train, layers run again": lambda folder, peak: train(folder, peak, checkpointing=True),
}


def measure(phase: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training.big_model", "--phase", phase, "--folder", str(folder)]
    # freed arrays go back to the system at once, so that the process holds what is alive
    environment = {**os.environ, "T2_CACHE": str(folder.parent / "cache"), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if run.returncode:
        raise RuntimeError(f"{phase}: {run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def planned(plan: ModelEstimate, checkpointing: bool) -> dict[str, float]:
    """Planned bytes of the phases of `train` that have plans, without embeddings and norms, which stay in files."""
    model = plan.serving(torch.int8) - plan.dense_parameters * plan.dtype.itemsize
    if plan.architecture.model_type not in ACTIVATIONS_OF:  # nothing is said about steps
        return {"loaded": model}
    batch = WORK.prompts_per_step, WORK.rows
    return {
        "loaded": model,
        "rollout_peak": model + plan.learnt + plan.rollout(WORK),
        "update_peak": model + plan.learnt + plan.update(WORK, *batch, checkpointing=checkpointing),
    }


def compare(
    measured: dict[int, dict[str, Any]], folder: Path, model: str, vocabulary: int, checkpointing: bool
) -> dict[str, Any]:
    """Measured and planned bytes of each stack, and of the whole model by the difference between the stacks."""
    whole = config(model).num_hidden_layers
    (few, first), *_, (many, last) = measured.items()
    found: dict[str, Any] = {}
    for name in ("loaded", "rollout_peak", "update_peak"):
        layer = (last[name] - first[name]) / (many - few)
        stacks = {layers: phases[name] for layers, phases in measured.items()}
        stacks[whole] = first[name] + (whole - few) * layer
        plans = {}
        for layers in stacks:
            path = folder / "config.json"
            write_text(path, json.dumps(config(model, layers, vocabulary).to_dict()))
            plans[layers] = planned(estimate_model(path), checkpointing).get(name)
        found[name] = {"a_layer": layer, "measured": stacks, "planned": plans}
    return found


def write_plans() -> None:
    """Writes the plans of the docs, which need no measurement."""
    for path in sorted(CONFIGS.glob("*.json")):
        write_results(RESULTS / f"plan-{path.name}", estimate_model(path).to_dict() | {"model": path.stem})


PLANNED = {"Llama-3-8B": "plan-llama-3-8b.json", "Llama-3-70B": "plan-llama-3-70b.json"}


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def plans_table(*results: Any) -> Table:
    """Sizes of both models and where they fit, by `t2 estimate`; results are the files of PLANNED."""
    plans = dict(zip(PLANNED, results, strict=True))

    def row(label: str, cell: Callable[[Any], str]) -> list[str]:
        return [label, *(cell(plan) for plan in results)]

    rows = [
        row("parameters per expert", lambda p: f"{p['parameters_per_expert']:,}"),
        row("multiply-adds over dense", lambda p: f"{p['multiply_adds']:.3f}"),
        row("factor cache on disk, GB", lambda p: gigabytes(p["disk"])),
        row("memory while decomposing, GB", lambda p: gigabytes(p["decompose"]["peak"])),
    ]
    for storage in ("float32", "bfloat16", "int8"):
        rows.append(row(f"factors in {storage}, GB", lambda p, s=storage: gigabytes(p["storage"][s]["factors"])))
    rows.append(row("int8, ready to serve, GB", lambda p: gigabytes(p["storage"]["int8"]["serving"])))
    rows.append(row("cache of one token, MB", lambda p: f"{p['cache_per_token'] / 1e6:.2f}"))
    for place, gpu in enumerate(results[0]["storage"]["int8"]["gpus"]):
        label = f"int8 on {gpu['gb']} GB: token budget"
        rows.append(row(label, lambda p, i=place: token_budgets(p["storage"]["int8"]["gpus"][i])))
    work = results[0]["work"]
    return Table(
        f"Models of bfloat16; a step of {work['prompts_per_step']} prompts of {work['prompt_tokens']} tokens with "
        f"{work['samples_per_prompt']} answers of {work['new_tokens']}. Token budgets are the largest that fit, "
        "without and with `--gradient-checkpointing`:",
        ["", *plans],
        rows,
    )


def token_budgets(gpu: Mapping[str, Any]) -> str:
    """Largest token budgets without and with gradient checkpointing, or the number of GPUs to train on."""
    plain, checkpointed = gpu["token_budget"], gpu["token_budget_checkpointing"]
    if checkpointed is None:
        return f"needs {gpu['gpus_to_train']} GPUs"
    return f"{'none' if plain is None else f'{plain:,}'} / {checkpointed:,}"


def memory_table(results: Any) -> Table:
    """Measured memory beside the plan, for the stacks and extrapolated to all layers."""
    found, work, model = results["decompose"], results["work"], results["model"]
    whole = str(config(model).num_hidden_layers)
    rows = [
        ["decomposing one layer's matrices", "1", f"{found['peak'] / 1e9:.2f}", f"{found['planned_peak'] / 1e9:.2f}"]
    ]
    for layers, run in results["train"]["runs"].items():
        rows.append(["loading", layers, f"{run['loading_peak'] / 1e9:.2f}", ""])
    for label, run, phase in (
        ("loaded, int8", "train", "loaded"),
        ("rollout", "train", "rollout_peak"),
        ("update", "train", "update_peak"),
        ("update, layers run again", "train, layers run again", "update_peak"),
    ):
        entry = results[run]["memory"][phase]
        for layers, measured in entry["measured"].items():
            shown = f"{layers} (by what a layer adds)" if layers == whole else layers
            plan = entry["planned"][layers]
            rows.append([label, shown, f"{measured / 1e9:.2f}", "" if plan is None else f"{plan / 1e9:.2f}"])
    return Table(
        f"Random weights in the shapes of {model}, vocabulary {results['vocabulary']:,}, on "
        f"{results['machine']['processor']}: {work['prompts_per_step']} prompts of {work['prompt_tokens']} tokens with "
        f"{work['samples_per_prompt']} answers of {work['new_tokens']}, all in one micro-batch "
        f"(`python -m benchmarks.training.big_model --model {model}`). Anonymous memory above the imports, without the "
        "embeddings, which stay mapped from their file:",
        ["phase", "layers", "measured, GB", "planned, GB"],
        rows,
    )


def main(
    model: str = "llama-3-8b",
    vocabulary: int | None = None,
    layers: tuple[int, ...] = (1, 3),
    phase: str | None = None,
    folder: Path | None = None,
    results: Path | None = None,
) -> None:
    """Args:
    model: Of benchmarks/configs/.
    vocabulary: Another vocabulary than the model's.
    layers: Numbers of layers to measure, at least two.
    phase: Run this phase in this process and print its measurements; default all, each in a process.
    folder: Checkpoint of that phase; without one, the parent of the temporary folder.
    results: File for the results as JSON; default benchmarks/results/big-model-NAME.json.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if phase is not None:
        assert folder is not None
        sampler = AnonymousPeak()
        sampler.start()
        print(json.dumps(PHASES[phase](folder, sampler)))
        return
    write_plans()
    if len(layers) < 2 or list(layers) != sorted(set(layers)):
        raise ValueError(f"layers: expected at least two different numbers, the smallest first, got {layers}")
    words = config(model, vocabulary=vocabulary).vocab_size
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        for count in layers:
            make(root / f"{count}", config(model, count, vocabulary))
        base = measure("imports", root / f"{layers[0]}")["peak"]
        decomposed = measure("decompose", root / f"{layers[0]}")
        decomposed["peak"] -= base
        plan = estimate_model(root / f"{layers[0]}", rates=Rates.measure())
        decomposed |= {"planned_peak": plan.decompose_peak, "planned_seconds": plan.decompose_seconds}
        steps = {}
        for name, checkpointing in (("train", False), ("train, layers run again", True)):
            runs: dict[int, dict[str, Any]] = {}
            for count in layers:
                runs[count] = measure(name, root / f"{count}")
                for figure in ("loading_peak", "loaded", "rollout_peak", "update_peak"):
                    runs[count][figure] -= base
            steps[name] = {"runs": runs, "memory": compare(runs, root, model, words, checkpointing)}
    found = {
        "machine": machine(),
        "model": model,
        "vocabulary": words,
        "work": vars(WORK),
        "decompose": decomposed,
        **steps,
    }
    found = json.loads(json.dumps(found))
    write_results(results or RESULTS / f"big-model-{model}.json", found)
    memory_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
