"""Factors with leading components in float16 and the others in blocks of 4 bits: drift and size by share.

    python -m benchmarks.serving.factor_tail

SmolLM2-135M-Instruct at z = 1 on the text of `fidelity`. Factors are rounded to what such storage would hold, each
component's vectors in blocks of their own, and run as float32. Writes benchmarks/results/factor-tail.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.serving.fidelity import MODEL, distance, logits_of, text_windows
from t2.weights.factor_cache import FactorCache
from t2.weights.machine import machine
from t2kernels import DenseWeight, FactoredWeight
from t2kernels.packing import BLOCK_BYTES, BLOCK_TERMS, INT4, PANEL

SHARES = (0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
BITS = 8 * BLOCK_BYTES[INT4] / (PANEL * BLOCK_TERMS)


def tail_table(results: Any) -> Table:
    """Bits and drift by the share of components in float16."""
    rows = [[f"{r['share']:.1%}", f"{r['bits']:.1f}", f"{r['mean_kl']:.3f}"] for r in results["shares"]]
    return Table(
        f"SmolLM2, leading components in float16 and the others in blocks of 4 bits, {results['tokens']:,} tokens "
        "(`python -m benchmarks.serving.factor_tail`):",
        ["share in float16", "bits for an entry of W", "mean KL from the base"],
        rows,
    )


def rounded(factor: Tensor, head: int) -> Tensor:
    """Vectors [r, n] of components, the first `head` in float16."""
    tail = DenseWeight.pack(factor[head:].contiguous(), dtype=INT4).matrix()
    return torch.cat([factor[:head].half().float(), tail])


@torch.no_grad()
def main(tokens: int = 1024, results: Path = RESULTS / "factor-tail.json") -> None:
    """Args:
    tokens: Length of the text.
    results: File for the results as JSON.
    """
    model, tokenizer = t2.load(MODEL)
    windows = text_windows(tokenizer, tokens)
    base = logits_of(model, windows)
    svf, cache, shares = t2.SVFModel(model, t2.SVFConfig(progress=False)), FactorCache(), []
    for share in tqdm(SHARES, desc="shares"):
        stored = entries = 0.0
        for name, layer in svf.decomposed.routed.items():
            u, s, vh = cache.load(svf.weight_keys[name])
            head = int(len(s) * share) // PANEL * PANEL
            stored += (u.shape[0] + vh.shape[1]) * (16 * head + BITS * (len(s) - head))
            entries += u.shape[0] * vh.shape[1]
            layer.weight = FactoredWeight.pack(rounded(u.T, head).T, s, rounded(vh, head))
            layer.shared_input = None
        found = distance(base, logits_of(svf, windows), windows)
        shares.append({"share": share, "bits": stored / entries, **found})
    content = {"machine": machine(), "tokens": windows.numel(), "shares": shares}
    write_results(results, content)
    tail_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
