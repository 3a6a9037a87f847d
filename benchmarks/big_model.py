"""A model of Llama-3-8B's shapes from shards to a training step on a small machine, against `t2 estimate`.

    python benchmarks/big_model.py                       # a vocabulary of 128,256, stacks of 1 and 3 layers
    python benchmarks/big_model.py --vocabulary 4096

Makes sharded checkpoints of random bfloat16 weights, decomposes one layer's matrices straight from the shards, then
loads each stack with int8 factors and takes a step of REINFORCE with it through the trainer's own code, with and
without running layers again in the backward pass. The layers of a stack are copies of one, whose factors the cache
therefore computes once. Each phase is a process of its own; its peak is anonymous memory, above that of a process that
only imports. Embeddings stay mapped from their files, so they are taken off what is planned. What a layer adds is
extrapolated to all 32. Minutes. Writes benchmarks/results/big-model.json, and the plans of benchmarks/configs/ beside.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import t2
from benchmarks.memory import AnonymousPeak
from t2.model.serving_plan import cost_model
from t2.tasks import Problem, Split, Task
from t2.training import Trainer, TrainOptions
from t2.training.policies import svf_config
from t2.weights.estimate import Footprint, footprint
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.machine import machine
from t2.weights.memory_model import Rates, Work
from t2.weights.shards import INDEX
from t2.weights.streaming import skeleton, target_weights
from t2kernels.files import write_text

RESULTS = Path(__file__).parent / "results" / "big-model.json"
LAYERS = 32
WORK = Work(prompt_tokens=128, new_tokens=64, prompts_per_step=2, samples_per_prompt=4)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Parity(Task):
    """Random prompts; an answer is right if the checksum of its text is even, as about half of them are."""

    name = "parity"
    max_new_tokens = WORK.new_tokens

    def problems(self, split: Split) -> Sequence[Problem]:
        seeds = range(WORK.prompts_per_step)
        texts = [" ".join(f"w{(7 * i + 13 * seed) % 1000}" for i in range(WORK.prompt_tokens)) for seed in seeds]
        return [Problem(({"role": "user", "content": text},)) for text in texts]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [float(zlib.crc32(answer.encode()) % 2 == 0) for answer in answers]


def config(layers: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        rope_theta=500000.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def make(folder: Path, layers: int, vocabulary: int) -> None:
    """A checkpoint in a shard for each layer and one for the rest, each written as soon as it is made."""
    folder.mkdir()
    settings = config(layers, vocabulary)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in skeleton(settings, torch.bfloat16).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tuple(parameter.shape)
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
    words = [*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))]
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=table, **named).save_pretrained(folder)


# Phases: each runs in a process of its own and returns its figures


def only_imports(folder: Path, peak: AnonymousPeak) -> dict[str, Any]:
    return {"peak": peak.now()}


def decompose(folder: Path, peak: AnonymousPeak) -> dict[str, Any]:
    weights = target_weights(folder, "all-linear", dtype=torch.bfloat16)
    done = decompose_weights(weights, FactorCache(), progress=False)
    seconds = {f"{'x'.join(map(str, weights[name].shape))} {name}": entry.seconds for name, entry in done.items()}
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
    trainer = Trainer(svf, tokenizer, Parity(), knobs)
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
    command = [sys.executable, __file__, "--phase", phase, "--folder", str(folder)]
    # freed arrays go back to the system at once, so that the process holds what is alive
    environment = {**os.environ, "T2_CACHE": str(folder.parent / "cache"), "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{phase}: {run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def planned(plan: Footprint, checkpointing: bool) -> dict[str, float]:
    """What the phases of `train` should hold, embeddings and norms left in their files."""
    model = plan.serving(torch.int8) - plan.dense_parameters * plan.dtype.itemsize
    batch = WORK.prompts_per_step, WORK.rows
    return {
        "loaded": model,
        "rollout_peak": model + plan.learnt + plan.rollout(WORK),
        "update_peak": model + plan.learnt + plan.update(WORK, *batch, checkpointing=checkpointing),
    }


def compare(measured: dict[int, dict[str, Any]], folder: Path, vocabulary: int, checkpointing: bool) -> dict[str, Any]:
    """Figures and plans of each stack, and of all 32 layers by the difference between the stacks."""
    (few, first), *_, (many, last) = measured.items()
    found: dict[str, Any] = {}
    for name in ("loaded", "rollout_peak", "update_peak"):
        layer = (last[name] - first[name]) / (many - few)
        stacks = {layers: figures[name] for layers, figures in measured.items()}
        stacks[LAYERS] = first[name] + (LAYERS - few) * layer
        plans = {}
        for layers in stacks:
            path = folder / "config.json"
            write_text(path, json.dumps(config(layers, vocabulary).to_dict()))
            plans[layers] = planned(footprint(path), checkpointing)[name]
        found[name] = {"a_layer": layer, "measured": stacks, "planned": plans}
    return found


def write_plans() -> None:
    """The plans of the docs, which need no measurement."""
    for path in sorted((Path(__file__).parent / "configs").glob("*.json")):
        facts = footprint(path).to_dict() | {"model": path.stem}
        write_text(RESULTS.parent / f"plan-{path.name}", json.dumps(facts, indent=1) + "\n")


def main(
    vocabulary: int = 128256,
    layers: tuple[int, ...] = (1, 3),
    phase: str | None = None,
    folder: Path | None = None,
) -> None:
    """Args:
    vocabulary: Of the synthetic model.
    layers: Stacks that are measured, at least two.
    phase: Runs one phase in this process and prints its figures; by default all run, each in its own.
    folder: The checkpoint of that phase; by default, where all run, a new temporary folder's.
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
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        for count in layers:
            make(root / f"{count}", count, vocabulary)
        base = measure("imports", root / f"{layers[0]}")["peak"]
        decomposed = measure("decompose", root / f"{layers[0]}")
        decomposed["peak"] -= base
        plan = footprint(root / f"{layers[0]}", rates=Rates.measure())
        decomposed |= {"planned_peak": plan.decompose_peak, "planned_seconds": plan.decompose_seconds}
        steps = {}
        for name, checkpointing in (("train", False), ("train, layers run again", True)):
            runs: dict[int, dict[str, Any]] = {}
            for count in layers:
                runs[count] = measure(name, root / f"{count}")
                for figure in ("loading_peak", "loaded", "rollout_peak", "update_peak"):
                    runs[count][figure] -= base
            steps[name] = {"runs": runs, "memory": compare(runs, root, vocabulary, checkpointing)}
    results = {"machine": machine(), "vocabulary": vocabulary, "work": vars(WORK), "decompose": decomposed, **steps}
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict[str, Any]) -> None:
    table = Table("phase", "layers", "measured, GB", "planned, GB")
    found = results["decompose"]
    table.add_row("decompose, peak", "1", f"{found['peak'] / 1e9:.2f}", f"{found['planned_peak'] / 1e9:.2f}")
    for name in ("train", "train, layers run again"):
        for figure, entry in results[name]["memory"].items():
            for layers, measured in entry["measured"].items():
                plan = entry["planned"][layers]
                table.add_row(f"{name}: {figure}", str(layers), f"{measured / 1e9:.2f}", f"{plan / 1e9:.2f}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
