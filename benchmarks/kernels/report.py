"""Tables and plots of the CPU kernels' results: ratios by round, shares of the machine's limits.

python -m benchmarks.kernels.report     # prints the tables, writes docs/cpu-linear.png and docs/cpu-linear-avx2.png
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.tables import RESULTS, ROOT, Table, machine_and_limits, read_results

SQUARE = "Llama-3-8B q, o"
BATCHES = (1, 4, 8, 16, 64, 256)
STORED = ("ours float32", "ours bfloat16", "ours bfloat16, bfloat16 x", "ours float16", "ours int8")
EAGER = "torch factored"
LORA = "PEFT LoRA r=16, mixed"
ARITHMETIC = {  # of each of our paths
    "ours float32": "float32",
    "ours float16": "float32",
    "ours bfloat16": "float32",
    "ours bfloat16, bfloat16 x": "bfloat16",
    "ours int8": "int16",
}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1 + 1 / 32}  # int8: with its float16 head

Result = dict[str, Any]
"""One test of a result file: seconds of each path and rates of the machine, by round."""


def find(results: Any, test: str, batch: int, shape: str = SQUARE, **info: Any) -> Result:
    """The one result of a test with these parameters."""
    wanted = {"test": test, "batch": batch, "shape": shape, **info}
    found = [each for each in results["benchmarks"] if all(each.get(k) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"expected one result for {wanted}, got {len(found)}")
    only: Result = found[0]
    return only


def delta_table(results: Any) -> Table:
    """Times of the delta form over the dense product of the same storage on the same kernels."""
    rows = []
    for result in results["benchmarks"]:
        if result["test"] != "test_delta":
            continue
        ratios = [
            f"{1 / ratio(result, f'dense {kind}', f'delta {kind}, {k}'):.2f}"
            for kind in ("bfloat16", "int8", "int4")
            for k in (64, 256)
        ]
        ratios.append(f"{ratio(result, 'dense int8', 'dense int4'):.2f}")
        factored = f"{1 / ratio(result, 'dense bfloat16', 'factored bfloat16'):.2f}"
        library = f"{1 / ratio(result, 'torch dense bfloat16', 'delta bfloat16, 256'):.2f}"
        rows.append([result["shape"], str(result["batch"]), *ratios, factored, library])
    return Table(
        "Time of a layer in the delta form over the dense product of the same storage on our kernels, bfloat16 "
        "activations, up to 64 experts (`python -m pytest benchmarks/kernels/delta.py`):",
        [
            *("layer", "rows", "bf16, 64", "bf16, 256", "int8, 64", "int8, 256", "int4, 64", "int4, 256"),
            *("dense int8 / dense int4", "factored bf16", "bf16, 256 / torch dense"),
        ],
        rows,
    )


def shapes(results: Any) -> list[str]:
    return list(dict.fromkeys(each["shape"] for each in results["benchmarks"] if each["test"] == "test_linear"))


def seconds(result: Result, path: str) -> float:
    return statistics.median(result["seconds"][path])


def ratio(result: Result, other: str, ours: str) -> float:
    """Median over rounds of the other path's time over ours: above 1, ours is faster."""
    pairs = zip(result["seconds"][other], result["seconds"][ours], strict=True)
    return statistics.median(p / o for p, o in pairs)


def fastest(result: Result, prefixes: Iterable[str]) -> str:
    """Path with the shortest median among those whose name starts with one of the prefixes."""
    names = [name for name in result["seconds"] if name.startswith(tuple(prefixes))]
    return min(names, key=lambda name: seconds(result, name))


def work(result: Result) -> tuple[int, int]:
    """(entries of both factors, FMAs) of one factored product."""
    out, inputs = result["size"]
    entries = min(out, inputs) * (out + inputs)
    return entries, result["batch"] * entries


def factor_bytes(result: Result, path: str) -> float:
    return work(result)[0] * BYTES[path.removeprefix("ours ").partition(",")[0]]


def peaks(result: Result, path: str) -> list[float]:
    """FMAs a second of the machine in each round, of the kind that the path uses."""
    rates: list[float] = result["rates"][ARITHMETIC[path]] or result["rates"]["float32"]
    return rates


def share_of_bandwidth(result: Result, path: str) -> float:
    """Median over rounds of the factor bytes read a second over the machine's read bandwidth."""
    rates = zip(result["seconds"][path], result["rates"]["read"], strict=True)
    return statistics.median(factor_bytes(result, path) / s / rate for s, rate in rates)


def share_of_arithmetic(result: Result, path: str) -> float:
    """Median over rounds of FMAs a second over the machine's peak."""
    rates = zip(result["seconds"][path], peaks(result, path), strict=True)
    return statistics.median(work(result)[1] / s / rate for s, rate in rates)


def ratio_at_limits(result: Result, other: str, path: str) -> float:
    """Median over rounds of the other path's time over the least possible one: reading factors or FMAs at peak."""
    size, fmas = factor_bytes(result, path), work(result)[1]
    limits = zip(result["seconds"][other], result["rates"]["read"], peaks(result, path), strict=True)
    return statistics.median(s / max(size / r, fmas / p) for s, r, p in limits)


def linear_table(results: Any) -> Table:
    """Milliseconds of one square layer by number of rows."""
    paths = [*STORED, f"{EAGER} float32", f"{EAGER} bfloat16", "torch dense float32"]
    found = [find(results, "test_linear", batch) for batch in BATCHES]
    kernels = results["machine_info"]["kernels"]["chosen"]
    return Table(
        f"One 4096 x 4096 layer with a different expert in every row, {kernels} kernels, milliseconds by number of "
        "rows (`make bench`; the dense layer has no experts):",
        ["", *map(str, BATCHES)],
        [[path, *(f"{seconds(result, path) * 1e3:.2f}" for result in found)] for path in paths],
    )


def ratios_table(results: Any) -> Table:
    """Ratios to other paths and shares of the machine's limits, for one square layer by number of rows."""
    ours, wide, int8, dense = "ours bfloat16, bfloat16 x", "ours bfloat16", "ours int8", "torch dense float32"
    linear = {batch: find(results, "test_linear", batch) for batch in BATCHES}
    compiled = {batch: find(results, "test_compile", batch) for batch in (1, 4, 8, 16, 64)}
    rows: list[list[str]] = []

    def add(label: str, found: dict[int, Result], cell: Callable[[Result], str]) -> None:
        rows.append([label, *(cell(found[batch]) if batch in found else "" for batch in BATCHES)])

    def over(prefix: str, path: str) -> Callable[[Result], str]:
        def cell(result: Result) -> str:
            other = fastest(result, [prefix])
            return f"{ratio(result, other, path):.2f} ({other.rpartition(' ')[2]})"

        return cell

    for label, found, prefix in (
        ("bf16 / fastest eager factored", linear, EAGER),
        ("bf16 / torch.compile", compiled, "torch.compile"),
    ):
        add(label, found, over(prefix, ours))
        add(
            "the same, were ours at the machine's limits",
            found,
            lambda r, prefix=prefix: f"{ratio_at_limits(r, fastest(r, [prefix]), ours):.2f}",
        )
    add("int8 / fastest eager factored", linear, over(EAGER, int8))
    add("bf16 / dense float32, one F.linear of W", linear, lambda r: f"{ratio(r, dense, ours):.2f}")
    add("bf16 with float32 x / dense float32", linear, lambda r: f"{ratio(r, dense, wide):.2f}")
    few, many = ({batch: linear[batch] for batch in batches} for batches in ((1, 4, 8), (16, 64, 256)))
    for path in ("ours float32", ours, int8):
        label = f"share of read bandwidth, {path.removeprefix('ours ')}"
        add(label, few, lambda r, path=path: f"{share_of_bandwidth(r, path):.0%}")
    for path in STORED:
        label = f"share of multiply-add peak, {path.removeprefix('ours ')}"
        add(label, many, lambda r, path=path: f"{share_of_arithmetic(r, path):.0%}")
    caption = machine_and_limits(results["machine_info"], [*linear.values(), find(results, "test_linear", 2)])
    return Table(caption, ["4096 x 4096, by number of rows", *map(str, BATCHES)], rows)


def experts_table(results: Any) -> Table:
    """Other ways to serve 32 requests over ours, by how experts are drawn."""
    ours, wide, int8 = "ours bfloat16, bfloat16 x", "ours bfloat16", "ours int8"
    compared = (
        (LORA, wide),
        (LORA, ours),
        (LORA, int8),
        ("W' rebuilt per expert", ours),
        ("eigentune, full rank", ours),
    )
    draws = find(results, "test_popularity", 64)
    rows = []
    for kind in ("distinct", "zipf", "uniform", "identical"):
        result = find(results, "test_multi_expert", 32, popularity=kind)
        ratios = (f"{ratio(result, other, path):.1f}" if other in result["seconds"] else "" for other, path in compared)
        rows.append([kind, *ratios, f"{ratio(draws, f'ours bfloat16, {kind}', 'ours bfloat16, identical'):.3f}"])
    head = [
        "experts of 32 requests",
        "PEFT mixed / ours bf16 with float32 x",
        "/ ours bf16",
        "/ ours int8",
        "W' rebuilt / ours bf16",
        "eigentune / ours bf16",
        "64 rows: time / time with one expert",
    ]
    return Table(machine_and_limits(results["machine_info"], results["benchmarks"]), head, rows)


def shapes_table(results: Any) -> Table:
    """Milliseconds of every shape, with the fastest eager torch path over ours."""
    batches, rows = (1, 4, 16, 64, 256, 1024), []
    for shape in shapes(results):
        for path in ("ours bfloat16, bfloat16 x", "ours float16", "ours int8"):
            cells = []
            for batch in batches:
                result = find(results, "test_linear", batch, shape)
                eager = ratio(result, fastest(result, [EAGER]), path)
                cells.append(f"{seconds(result, path) * 1e3:.3g} ({eager:.1f}x)")
            rows.append([f"{shape}: {path.removeprefix('ours ')}", *cells])
    return Table("Milliseconds, and the fastest eager torch path over ours:", ["", *map(str, batches)], rows)


def backward_table(results: Any) -> Table:
    """Time of the backward pass in torch over ours, by shape and number of rows."""
    batches, kinds = (64, 512, 2048), {"fp32": "ours float32", "bf16": "ours bfloat16", "int8": "ours int8"}
    rows = []
    for shape in shapes(results):
        found = [find(results, "test_backward", batch, shape) for batch in batches]
        rows.append([shape, *(f"{ratio(r, 'torch float32', path):.2f}" for r in found for path in kinds.values())])
    head = ["", *(f"{batch} rows, {kind}" for batch in batches for kind in kinds)]
    return Table("Time of torch's two products on row-major float32 factors over ours:", head, rows)


def attention_table(results: Any) -> Table:
    """Attention of a decode step, and of a prompt, against sdpa in transformers."""
    ours, sdpa, rows = "ours", "transformers sdpa", []
    for result in results["benchmarks"]:
        is_step = "bytes" in result
        work, rate = (result["bytes"], "read") if is_step else (result["fmas"], "float32")
        pairs = zip(result["seconds"][ours], result["rates"][rate], strict=True)
        share = statistics.median(work / s / most for s, most in pairs)
        cells = (f"{seconds(result, path) / result['layers'] * 1e3:.3g}" for path in (ours, sdpa))
        label = f"{result['shape']}, {result['length']} tokens kept" if is_step else result["shape"]
        tokens = str(result["batch"]) if is_step else f"prompt of {result['length']}"
        limit = f"{share:.0%} of {'reading' if is_step else 'arithmetic'}"
        rows.append([label, tokens, *cells, f"{ratio(result, sdpa, ours):.1f}x", limit])
    return Table(
        "Attention and cache of a decode step (float32), and attention of a prompt (bfloat16), milliseconds a layer "
        "(`benchmarks/kernels/attention.py`). " + machine_and_limits(results["machine_info"], results["benchmarks"]),
        ["", "tokens", ours, sdpa, "sdpa / ours", "share of the limit"],
        rows,
    )


def plot(results: Any, path: Path) -> None:
    """Plots time against batch size, one panel per storage format, with the limits of reading and of arithmetic."""
    from matplotlib.figure import Figure

    found = [each for each in results["benchmarks"] if (each["test"], each["shape"]) == ("test_linear", SQUARE)]
    found.sort(key=lambda each: each["batch"])
    batches = [each["batch"] for each in found]
    panels = (
        ("float32", ["ours float32"], "torch factored float32"),
        ("bfloat16", ["ours bfloat16", "ours bfloat16, bfloat16 x"], "torch factored bfloat16"),
        ("float16", ["ours float16"], "torch factored float16"),
        ("int8", ["ours int8"], None),
    )
    figure = Figure(figsize=(11, 8))
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for axis, (name, ours, eager) in zip(axes.flat, panels, strict=True):
        for each in ours:
            axis.plot(batches, [seconds(r, each) * 1e3 for r in found], "o-", label=each)
        if eager:
            timed = [r for r in found if eager in r["seconds"]]
            times = [seconds(r, eager) * 1e3 for r in timed]
            axis.plot([r["batch"] for r in timed], times, "s--", color="tab:red", label=eager)
        dense = [seconds(r, "torch dense float32") * 1e3 for r in found]
        axis.plot(batches, dense, "^:", color="tab:gray", label="torch dense float32, no experts")
        read = factor_bytes(found[0], ours[0]) / statistics.median(x for r in found for x in r["rates"]["read"]) * 1e3
        axis.axhline(read, color="black", linewidth=0.8, linestyle="--")
        axis.text(batches[-1], read, "reading once", ha="right", va="bottom", fontsize=8)
        for kind in dict.fromkeys(ARITHMETIC[each] for each in ours):
            rates = [rate for r in found for rate in r["rates"][kind]]
            if not rates:
                continue
            limit = [work(r)[1] / statistics.median(rates) * 1e3 for r in found]
            axis.plot(batches, limit, color="black", linewidth=0.8)
            axis.text(batches[-1], limit[-1], f"{kind} multiply-adds ", ha="right", va="top", fontsize=8)
        axis.set(title=f"{name} factors", xscale="log", yscale="log", xlabel="rows, each its own expert", ylabel="ms")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_ylim(bottom=0.2)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    machine = results["machine_info"]
    where = f"{machine['processor']}, {machine['threads']} threads, {machine['kernels']['chosen']} kernels"
    figure.suptitle(f"4096 x 4096 factored layer, {where}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    for suffix in ("", "-avx2"):
        if (RESULTS / f"cpu-linear{suffix}.json").exists():
            linear = read_results(f"cpu-linear{suffix}.json")
            plot(linear, ROOT / "docs" / f"cpu-linear{suffix}.png")
            ratios_table(linear).show()
    linear = read_results("cpu-linear.json")
    for table in (linear_table, shapes_table, backward_table):
        table(linear).show()
    experts_table(read_results("cpu-experts.json")).show()
    attention_table(read_results("cpu-attention.json")).show()


if __name__ == "__main__":
    main()
