"""SVD algorithms compared for `t2kernels.decompose`: time, reconstruction and orthogonality.

    python -m benchmarks.kernels.svd_algorithms

Prints a table and writes `benchmarks/results/decompose-algorithms.json`. The real matrices are SmolLM2's
(layer 0); they are left out when the model cannot be loaded. The algorithms take turns; times are the best
of five rounds, of one for 4096 x 4096.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.common.tables import RESULTS, Table, write_results
from t2.weights.machine import machine
from t2kernels import decompose

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (1024, 4096), (4096, 4096))
Triple = tuple[Tensor, Tensor, Tensor]


def gesdd_float32(weight: Tensor) -> Triple:
    return tuple(torch.linalg.svd(weight.float(), full_matrices=False))


def gesdd_float64(weight: Tensor) -> Triple:
    return tuple(t.float() for t in torch.linalg.svd(weight.double(), full_matrices=False))


def qr_then_gesdd_float64(weight: Tensor) -> Triple:
    """Householder QR first, so that gesdd sees the small square R."""
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = qr_then_gesdd_float64(weight.T)
        return vh.T, s, u.T
    q, r = torch.linalg.qr(weight.double())
    u, s, vh = torch.linalg.svd(r)
    return (q @ u).float(), s.float(), vh.float()


def eigh_float32_refined(weight: Tensor) -> Triple:
    """float32 eigh of the Gram matrix, one Ogita-Aishima step, then the other factor by QR, in float64."""
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = eigh_float32_refined(weight.T)
        return vh.T, s, u.T
    a = weight.double()
    gram = a.T @ a
    v = torch.linalg.eigh(gram.float())[1].flip(1).double()
    rest = torch.eye(len(v), dtype=v.dtype) - v.T @ v
    rotated = v.T @ gram @ v
    values = rotated.diagonal() / (1 - rest.diagonal())
    gap = values[None, :] - values[:, None]
    bound = 2 * ((rotated - values.diag()).norm() + values.abs().max() * rest.norm())
    step = torch.where(gap.abs() > bound, (rotated + values[None, :] * rest) / gap, rest / 2)
    v = v + v @ step
    u, r = torch.linalg.qr(a @ v)
    return (u * r.diagonal().sign()).float(), r.diagonal().abs().float(), v.T.float()


ALGORITHMS: dict[str, Callable[[Tensor], Triple]] = {
    "gram (decompose)": decompose,
    "gesdd float32": gesdd_float32,
    "gesdd float64": gesdd_float64,
    "QR + gesdd float64": qr_then_gesdd_float64,
    "eigh float32 + refinement": eigh_float32_refined,
}


def measure(algorithm: Callable[[Tensor], Triple], weight: Tensor) -> dict[str, float]:
    start = time.perf_counter()
    factors = algorithm(weight)
    milliseconds = (time.perf_counter() - start) * 1e3
    u, s, vh = (t.double() for t in factors)
    eye = torch.eye(len(s), dtype=torch.float64)
    return {
        "milliseconds": milliseconds,
        "reconstruction_error": ((u * s @ vh - weight.double()).norm() / weight.double().norm()).item(),
        "orthogonality_error": max((g - eye).abs().max().item() for g in (u.T @ u, vh @ vh.T)),
    }


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {f"random {m}x{n}": torch.randn(m, n, generator=generator) for m, n in SHAPES}
    try:
        from t2.weights.loading import load

        layer = load("smollm2-135m-instruct")[0].model.layers[0]
    except (ImportError, OSError) as error:
        print(f"without SmolLM2: {error}")
        return found
    for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        weight = module.weight.detach()
        found["SmolLM2 " + "x".join(map(str, weight.shape))] = weight
    return found


def results_table(results: Any) -> Table:
    """Every algorithm on every matrix."""
    rows = [
        [
            row["matrix"],
            row["algorithm"],
            f"{row['milliseconds']:.1f}",
            f"{row['reconstruction_error']:.1e}",
            f"{row['orthogonality_error']:.1e}",
        ]
        for row in results["rows"]
    ]
    return Table(head=["matrix", "algorithm", "ms", "reconstruction error", "orthogonality error"], rows=rows)


def main(results: Path = RESULTS / "decompose-algorithms.json", largest: int = 4096 * 4096) -> None:
    """Args:
    results: File for the results as JSON.
    largest: Most entries of a matrix; larger ones are left out.
    """
    rows = []
    for matrix, weight in matrices().items():
        if weight.numel() > largest:
            continue
        rounds = 1 if weight.numel() > 5_000_000 else 5
        measured = [{name: measure(f, weight) for name, f in ALGORITHMS.items()} for _ in range(rounds)]
        for name in ALGORITHMS:
            row = min((m[name] for m in measured), key=lambda r: r["milliseconds"])
            rows.append({"matrix": matrix, "algorithm": name, **row})
    found = {"machine": machine(), "rows": rows}
    write_results(results, found)
    results_table(found).show()


if __name__ == "__main__":
    tyro.cli(main)
