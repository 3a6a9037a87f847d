"""Drift of each storage format from the base model, and of a mixed batch from its merged models.

    python -m benchmarks.serving.fidelity [--tokens 2048] [--llama-python PATH]

1. z = 1 on real English text (the READMEs that the installed packages transformers and peft carry as metadata):
   mean KL divergence of the next-token distributions from the float32 base, and perplexity. With the Python of an
   environment that has llama-cpp-python, its Q4_1 (the file that the weights come from) and Q8_0 beside it.
2. 32 requests with 32 experts in one batch, 32 greedy tokens each, against each expert merged into a plain model.

Prints a table and writes benchmarks/results/fidelity.json.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from dataclasses import asdict
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.serving.engine_peers import llama_workers
from t2.demo import baselines
from t2.demo.merged_check import check_row
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import fixed_length
from t2.model.layers import Packed
from t2.weights.factor_cache import FactorCache
from t2.weights.machine import machine
from t2kernels.packing import INT4

MODEL = "smollm2-135m-instruct"
STORAGE: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, bf16_products": {"dtype": torch.bfloat16, "bf16_products": True},
    "int8": {"dtype": torch.int8},
}
DELTA: dict[str, dict[str, Any]] = {
    f"W {name}, support of 64": {"dtype": dtype, "form": "delta", "support": 64}
    for name, dtype in (("int8", torch.int8), ("uint8", torch.uint8), ("int4", INT4))
}
WINDOW = 512
TEXT_PACKAGES = ("transformers", "peft")


def text_windows(tokenizer: Any, tokens: int) -> Tensor:
    readmes: list[Any] = [metadata(package) for package in TEXT_PACKAGES]
    text = "\n\n".join(str(readme.get_payload()) for readme in readmes)
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    count = min(tokens, len(ids)) // WINDOW
    return ids[: count * WINDOW].reshape(count, WINDOW)


@torch.no_grad()
def logits_of(model: Any, windows: Tensor) -> Tensor:
    return torch.cat([model(input_ids=window[None]).logits.float() for window in windows])


def distance(base: Tensor, other: Tensor, windows: Tensor) -> dict[str, float]:
    """KL(base || other) per position and the perplexity of `other`, from logits [windows, WINDOW, vocabulary]."""
    kl, likelihood = [], []
    for base_logits, other_logits, ids in zip(base, other, windows, strict=True):
        p, q = base_logits[:-1].double().log_softmax(-1), other_logits[:-1].double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        likelihood.append(q.gather(-1, ids[1:, None]))
    all_kl = torch.cat(kl)
    perplexity = float((-torch.cat(likelihood).mean()).exp())
    return {"mean_kl": float(all_kl.mean()), "largest_kl": float(all_kl.max()), "perplexity": perplexity}


def wrap(options: dict[str, Any]) -> t2.SVFModel:
    return t2.SVFModel(t2.load(MODEL)[0], t2.SVFConfig(**options))


def fidelity_table(results: Any) -> Table:
    """Every storage format: KL and perplexity at z = 1, agreement of 32 experts with their merged models."""
    rows = []
    for label, values in results["z_is_one"].items():
        checks = results["mixed_batch"].get(label.removeprefix("factors, "), [])
        equal, worst = sum(c["equal"] for c in checks), max((c["logit_difference"] for c in checks), default=0)
        rows.append(
            [
                label,
                f"{values['mean_kl']:.1e}" if values["mean_kl"] else "0",
                f"{values['perplexity']:.4f}",
                f"{values['bytes'] / 1e6:.0f}" if "bytes" in values else "",
                f"{equal} of {len(checks)}" if checks else "",
                f"{worst:.1e}" if checks else "",
            ]
        )
    return Table(
        f"Drift of the storage formats (SmolLM2, {results['tokens']:,} tokens of the {results['text']}; then the 32 "
        "requests with 32 experts, 32 greedy tokens each, against float32 merged models; "
        "`python -m benchmarks.serving.fidelity`):",
        ["storage", "mean KL at z = 1", "perplexity at z = 1", "MB", "rows as merged", "largest logit difference"],
        rows,
    )


def weight_bytes(svf: t2.SVFModel) -> int:
    """Stored bytes of all linear layers, the output embedding among them."""
    packed = [layer.packed for layer in svf.decomposed.packed.values() if isinstance(layer, Packed)]
    return sum(weight.nbytes for weight in (*(layer.weight for layer in svf.decomposed.routed.values()), *packed))


def llama_rows(python: Path, base: Tensor, windows: Tensor) -> dict[str, dict[str, float]]:
    """llama.cpp on the same text; bytes are those of its files."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in llama_workers(python, Path(folder)).items():
            logits, size = [], 0
            for window in windows:
                size = worker.ask(text=window.tolist(), logits=f"{folder}/logits.npy")["bytes"]
                logits.append(torch.from_numpy(numpy.load(f"{folder}/logits.npy")))
            rows[name.removesuffix(", no experts")] = distance(base, torch.stack(logits), windows) | {"bytes": size}
            worker.close()
    return rows


def main(tokens: int = 2048, llama_python: Path | None = None, results: Path = RESULTS / "fidelity.json") -> None:
    """Args:
    tokens: Length of the text.
    llama_python: Python with llama-cpp-python; None leaves it out.
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = t2.load(MODEL)
    dense: Any = model
    windows = text_windows(tokenizer, tokens)
    base = logits_of(dense, windows)
    rows: dict[str, dict[str, float]] = {"base, float32": distance(base, base, windows)}
    half = copy.deepcopy(dense).to(torch.bfloat16)
    rows["base cast to bfloat16"] = distance(base, logits_of(half, windows), windows)
    del half

    batch = chat_batch(tokenizer, list(QUESTIONS))
    names = [f"e{i}" for i in range(len(QUESTIONS))]
    generated = {}
    for label, options in tqdm(STORAGE.items(), desc="storage formats"):
        svf = wrap(options)
        rows[f"factors, {label}"] = distance(base, logits_of(svf, windows), windows) | {"bytes": weight_bytes(svf)}
        for seed, name in enumerate(names):
            svf.add_expert(name, t2.Expert.random(svf.layout, seed=seed))
        generated[label] = svf.generate(
            **batch,
            experts=names,
            **fixed_length(32),
            return_dict_in_generate=True,
            output_logits=True,
        )
        layout, z = svf.layout, svf.bank.matrix
        keys = svf.weight_keys
        del svf
        gc.collect()

    for label, options in DELTA.items():
        svf = wrap(options)
        rows[label] = distance(base, logits_of(svf, windows), windows) | {"bytes": weight_bytes(svf)}
        del svf
        gc.collect()
    if llama_python is not None:
        rows |= llama_rows(llama_python, base, windows)

    cache = FactorCache()
    factors = {name: cache.load(key) for name, key in keys.items()}
    checks: dict[str, list[Any]] = {label: [] for label in generated}
    for row, name in enumerate(tqdm(names, desc="merged models")):
        baselines.rebuild(dense, factors, layout, z[row])
        for label, output in generated.items():
            checks[label].append(check_row(dense, batch, output, row, name))

    for check in checks["float32"]:
        for position, gap in check.ties:
            print(f"float32, {check.expert}: token {position} differs, leading logits {gap:.1e} apart")
    report = {
        "model": MODEL,
        "machine": machine(),
        "text": f"READMEs of {', '.join(TEXT_PACKAGES)} (package metadata)",
        "tokens": windows.numel(),
        "z_is_one": rows,
        "mixed_batch": {label: [asdict(check) for check in found] for label, found in checks.items()},
    }
    write_results(results, report)
    fidelity_table(report).show()


if __name__ == "__main__":
    tyro.cli(main)
