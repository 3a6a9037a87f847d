"""One mixture-of-experts layer in the shape of Qwen3-30B-A3B's, beside transformers' own paths on the dense weights.

    python -m benchmarks.kernels.moe

32 tokens, each of a request with an SVF expert of its own, are sent to 8 of 128 experts; bfloat16. Weights are random.
All paths take turns. Writes benchmarks/results/cpu-moe.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from t2.weights.machine import machine
from t2kernels import Factors

HIDDEN, INNER, EXPERTS, CHOSEN = 2048, 768, 128, 8
SUPPORT = 64


class Block(nn.Module):
    """The experts and nothing else: what a router would say is given."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        config = AutoConfig.for_model(
            "qwen3_moe",
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
        )
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.normal_(std=0.02, generator=generator)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, index, weights)
        return y


def random_factors(name: str, weight: Tensor) -> Factors:
    """Factors of the right shapes: their product is not the weight, which changes no time."""
    rank = min(weight.shape)
    return Factors(
        torch.randn(weight.shape[0], rank) / rank**0.5, torch.rand(rank) + 0.5, torch.randn(rank, weight.shape[1]) / 45
    )


def ours(tokens: int, **options: Any) -> t2.SVFModel:
    """The wrapped block with an expert for each token."""
    config = t2.SVFConfig(dtype=torch.bfloat16, cache=False, verify=False, progress=False, slots=tokens + 1, **options)
    svf = t2.SVFModel(Block("eager"), config, factors=random_factors)
    free = torch.arange(svf.layout.R) if svf.support is None else svf.support
    for seed in range(tokens):
        z = torch.ones(svf.layout.R)
        z[free] += 0.1 * torch.randn(len(free), generator=torch.Generator().manual_seed(seed))
        svf.add_expert(f"e{seed}", t2.Expert(z, svf.layout))
    return svf


def moe_table(results: Any) -> Table:
    """Milliseconds and bytes of each path, and its ratio to transformers' fastest."""
    peers = [name for name in results["seconds"] if name.startswith("transformers")]
    best = min(peers, key=lambda name: statistics.median(results["seconds"][name]))
    dense = results["seconds"][best]
    rows = []
    for name, seconds in results["seconds"].items():
        ratio = statistics.median(own / other for own, other in zip(seconds, dense, strict=True))
        size = f"{results['bytes'][name] / 1e6:,.0f}"
        rows.append([name, f"{1e3 * statistics.median(seconds):.1f}", f"{ratio:.2f}", size])
    about = results["machine"]
    return Table(
        f"A layer of {EXPERTS} experts, {HIDDEN} x {INNER}, {results['tokens']} tokens sent to {CHOSEN} each, "
        f"bfloat16, {about['threads']} cores of {about['processor']} (`python -m benchmarks.kernels.moe`):",
        ["path", "ms", "/ transformers' fastest", "MB"],
        rows,
    )


@torch.no_grad()
def main(tokens: int = 32, rounds: int = 9, results: Path = RESULTS / "cpu-moe.json") -> None:
    """Args:
    tokens: Number of tokens, each of a request of its own.
    rounds: Turns of each path.
    results: File for the results as JSON.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    scores, index = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN)
    weights = (scores / scores.sum(-1, keepdim=True)).to(torch.bfloat16)
    paths: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    block = Block("eager")
    config: Any = block.experts.config
    dense_bytes = sum(parameter.nbytes for parameter in block.parameters())
    for name in ("eager", *(each for each in ("grouped_mm", "batched_mm") if each in ALL_EXPERTS_FUNCTIONS)):

        def dense(name: str = name) -> Tensor:
            config._experts_implementation = name
            y: Tensor = block(x, index, weights)
            return y

        paths[f"transformers, {name}, no SVF experts"] = dense
        sizes[f"transformers, {name}, no SVF experts"] = dense_bytes
    names = [f"e{i}" for i in range(tokens)]
    for name, options in (("factored", {}), (f"delta, support of {SUPPORT}", {"form": "delta", "support": SUPPORT})):
        svf = ours(tokens, **options)
        label = f"ours, {name}, {tokens} SVF experts"
        paths[label] = lambda svf=svf: svf(x, index, weights, experts=names)
        sizes[label] = sum(layer.weight.nbytes for layer in svf.factored_layers.values())
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, run in paths.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    content = {"machine": machine(), "tokens": tokens, "seconds": seconds, "bytes": sizes}
    write_results(results, content)
    moe_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
