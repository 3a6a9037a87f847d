"""How close each storage format stays to the base model, and a mixed batch to its merged models.

    python benchmarks/fidelity.py [--tokens 4096]

1. z = 1 on real English text (the READMEs that the installed packages transformers and peft carry as metadata):
   mean KL divergence of the next-token distributions from the float32 base, and perplexity.
2. 32 requests with 32 experts in one batch, 32 greedy tokens each, against each expert merged into a plain model.

Prints tables and writes benchmarks/results/fidelity.json.
"""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import asdict
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

import t2
from t2.demo import baselines as peers
from t2.demo.merged_check import check_row
from t2.demo.run import QUESTIONS, chat_batch
from t2.demo.throughput import fixed_length
from t2.weights.factor_cache import FactorCache
from t2.weights.machine import machine

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m-instruct"
STORAGE: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, bf16_products": {"dtype": torch.bfloat16, "bf16_products": True},
    "int8": {"dtype": torch.int8},
}
WINDOW = 512
TEXT_PACKAGES = ("transformers", "peft")


def text_windows(tokenizer: Any, tokens: int) -> Tensor:
    text = "\n\n".join(str(metadata(package).get_payload()) for package in TEXT_PACKAGES)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
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


def main(tokens: int = 4096) -> None:
    """Args:
    tokens: Length of the text, in tokens.
    """
    out = Console()
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
        rows[f"factors, {label}"] = distance(base, logits_of(svf, windows), windows)
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

    cache = FactorCache()
    factors = {name: cache.load(key) for name, key in keys.items()}
    checks: dict[str, list[Any]] = {label: [] for label in generated}
    for row, name in enumerate(tqdm(names, desc="merged models")):
        peers.rebuild(dense, factors, layout, z[row])
        for label, output in generated.items():
            checks[label].append(check_row(dense, batch, output, row, name))

    table = Table("z = 1", "mean KL", "largest KL", "perplexity", title=f"{MODEL}, {windows.numel():,} tokens of text")
    for label, row_values in rows.items():
        table.add_row(
            label, f"{row_values['mean_kl']:.2e}", f"{row_values['largest_kl']:.2e}", f"{row_values['perplexity']:.4f}"
        )
    out.print(table)
    table = Table("factors", "rows with the merged model's 32 tokens", "largest logit difference", title="32 experts")
    for label, found in checks.items():
        table.add_row(
            label,
            f"{sum(check.equal for check in found)} of {len(found)}",
            f"{max(check.logit_difference for check in found):.2e}",
        )
    out.print(table)
    for label, found in checks.items():
        for check in found:
            for position, gap in check.ties:
                if label == "float32":
                    out.print(f"float32, {check.expert}: token {position} differs, leading logits {gap:.1e} apart")
    results = {
        "model": MODEL,
        "machine": machine(),
        "text": f"READMEs of {', '.join(TEXT_PACKAGES)} (package metadata)",
        "tokens": windows.numel(),
        "z_is_one": rows,
        "mixed_batch": {label: [asdict(check) for check in found] for label, found in checks.items()},
    }
    (RESULTS / "fidelity.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
