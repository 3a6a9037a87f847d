"""What benchmarks/results/cpu-*.json says: ratios by round, shares of the machine's limits, and the plot.

python benchmarks/results_cpu.py     # writes docs/cpu-linear.png and docs/cpu-linear-avx2.png
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
SQUARE = "Llama-3-8B q, o"
ARITHMETIC = {  # of each of our paths
    "ours float32": "float32",
    "ours float16": "float32",
    "ours bfloat16": "float32",
    "ours bfloat16, bfloat16 x": "bfloat16",
    "ours int8": "int16",
}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1 + 1 / 32}  # int8: with its float16 head


class Linear:
    """One file of bench_linear.py."""

    def __init__(self, name: str) -> None:
        self.data = json.loads((RESULTS / name).read_text())
        self.machine = self.data["machine_info"]

    def find(self, test: str, batch: int, shape: str = SQUARE, **info: Any) -> dict[str, Any]:
        wanted = {"test": test, "batch": batch, "shape": shape, **info}
        found = [b for b in self.data["benchmarks"] if all(b.get(k) == v for k, v in wanted.items())]
        if len(found) != 1:
            raise ValueError(f"expected one result for {wanted}, got {len(found)}")
        return found[0]

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(b["shape"] for b in self.data["benchmarks"] if b["test"] == "test_linear"))

    def batches(self) -> list[int]:
        return sorted({b["batch"] for b in self.data["benchmarks"] if b["test"] == "test_linear"})


def seconds(result: dict[str, Any], path: str) -> float:
    return statistics.median(result["seconds"][path])


def ratio(result: dict[str, Any], peer: str, ours: str) -> float:
    """Median over the rounds of the peer's time over ours."""
    pairs = zip(result["seconds"][peer], result["seconds"][ours], strict=True)
    return statistics.median(p / o for p, o in pairs)


def fastest(result: dict[str, Any], prefixes: Iterable[str]) -> str:
    """The path with the shortest median among those that start so."""
    names = [name for name in result["seconds"] if name.startswith(tuple(prefixes))]
    return min(names, key=lambda name: seconds(result, name))


def work(result: dict[str, Any]) -> tuple[int, int]:
    """(entries of both factors, multiply-adds) of one factored product."""
    out, inputs = result["size"]
    entries = min(out, inputs) * (out + inputs)
    return entries, result["batch"] * entries


def storage(path: str) -> str:
    return path.removeprefix("ours ").partition(",")[0]


def share_of_bandwidth(result: dict[str, Any], path: str) -> float:
    """Bytes of the factors read a second, over what the machine read in the same round: the median."""
    count = work(result)[0] * BYTES[storage(path)]
    rates = zip(result["seconds"][path], result["rates"]["read"], strict=True)
    return statistics.median(count / s / rate for s, rate in rates)


def share_of_arithmetic(result: dict[str, Any], path: str) -> float:
    """Multiply-adds a second over the machine's, of the kind that the path uses, in the same round: the median."""
    kind = ARITHMETIC[path]
    rates = result["rates"][kind] or result["rates"]["float32"]
    return statistics.median(work(result)[1] / s / r for s, r in zip(result["seconds"][path], rates, strict=True))


def ratio_at_limits(result: dict[str, Any], peer: str, path: str) -> float:
    """Median over the rounds of the peer's time over the least that a path could take: reading its factors or
    multiplying, whichever is longer, at what the machine managed in that round."""
    entries, multiply_adds = work(result)
    peaks = result["rates"][ARITHMETIC[path]] or result["rates"]["float32"]
    limits = zip(result["seconds"][peer], result["rates"]["read"], peaks, strict=True)
    return statistics.median(s / max(entries * BYTES[storage(path)] / r, multiply_adds / p) for s, r, p in limits)


def plot(linear: Linear, to: Path) -> None:
    """Time against batch size, one panel per storage format, with the limits of reading and of arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = linear.batches()
    results = [linear.find("test_linear", batch) for batch in batches]
    panels = (
        ("float32", ["ours float32"], "torch factored float32"),
        ("bfloat16", ["ours bfloat16", "ours bfloat16, bfloat16 x"], "torch factored bfloat16"),
        ("float16", ["ours float16"], "torch factored float16"),
        ("int8", ["ours int8"], None),
    )
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True)
    for axis, (name, ours, peer) in zip(axes.flat, panels, strict=True):
        for path in ours:
            axis.plot(batches, [seconds(r, path) * 1e3 for r in results], "o-", label=path)
        if peer:
            timed = [r for r in results if peer in r["seconds"]]
            axis.plot(
                [r["batch"] for r in timed],
                [seconds(r, peer) * 1e3 for r in timed],
                "s--",
                color="tab:red",
                label=peer,
            )
        dense = [seconds(r, "torch dense float32") * 1e3 for r in results]
        axis.plot(batches, dense, "^:", color="tab:gray", label="torch dense float32, no experts")
        entries = work(results[0])[0]
        read = statistics.median(rate for r in results for rate in r["rates"]["read"])
        axis.axhline(entries * BYTES[name] / read * 1e3, color="black", linewidth=0.8, linestyle="--")
        axis.text(batches[-1], entries * BYTES[name] / read * 1e3, "reading once", ha="right", va="bottom", fontsize=8)
        for kind in dict.fromkeys(ARITHMETIC[path] for path in ours):
            rates = [rate for r in results for rate in r["rates"][kind]]
            if not rates:
                continue
            limit = [work(r)[1] / statistics.median(rates) * 1e3 for r in results]
            axis.plot(batches, limit, color="black", linewidth=0.8)
            axis.text(batches[-1], limit[-1], f"{kind} multiply-adds ", ha="right", va="top", fontsize=8)
        axis.set(title=f"{name} factors", xscale="log", yscale="log", xlabel="rows, each its own expert", ylabel="ms")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_ylim(bottom=0.2)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    machine = linear.machine
    kernels = machine["kernels"]["chosen"]
    figure.suptitle(
        f"4096 x 4096 factored layer, {machine['processor']}, {machine['threads']} threads, {kernels} kernels"
    )
    figure.tight_layout()
    DOCS.mkdir(exist_ok=True)
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    for suffix in ("", "-avx2"):
        if (RESULTS / f"cpu-linear{suffix}.json").exists():
            plot(Linear(f"cpu-linear{suffix}.json"), DOCS / f"cpu-linear{suffix}.png")
