"""Writes the tables of README.md from the JSON files in benchmarks/results/.

python benchmarks/readme.py            # rewrites the sections between <!-- name --> and <!-- end -->
python benchmarks/readme.py --check    # exits 1 if README.md is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, alignment, *rows))


def demo() -> str:
    results = read("demo.json")
    paths = {path["name"]: path for path in results["paths"]}
    ours = paths["ours"]
    rows = []
    for name, path in sorted(paths.items(), key=lambda item: -item[1]["tokens_per_second"]):
        decode = path["decode_tokens_per_second"]
        rows.append(
            [
                f"**{name}**" if path is ours else name,
                str(path["experts"]),
                f"{path['tokens_per_second']:.0f}",
                f"{ours['tokens_per_second'] / path['tokens_per_second']:.2f}",
                f"{decode:.0f}" if decode else "",
                f"{ours['decode_tokens_per_second'] / decode:.2f}" if decode else "",
            ]
        )
    head = ["path", "experts in a batch", "tokens/s", "ours / this", "decode tokens/s", "ours / this"]
    machine = results["machine"]
    return (
        f"What `make demo` measured on {machine['processor']}, {machine['threads']} cores, torch {machine['torch']}, "
        f"{machine['kernels']['chosen']} kernels: SmolLM2-135M-Instruct, {ours['requests']} chat requests in a batch, "
        f"{ours['new_tokens']} new tokens each, {results['dtype']}. All paths in the same run.\n\n"
        + table(head, rows)
        + f"\n\n{results['rows_equal_to_merged_model']} of {ours['requests']} rows give the same 32 greedy tokens as "
        f"their expert merged into a plain model; logits differ by {results['largest_logit_difference']:.1e} at most."
    )


def linear() -> str:
    medians: dict[str, dict[str, float]] = {}
    for benchmark in read("cpu-linear.json")["benchmarks"]:
        medians.setdefault(benchmark["group"], {})[benchmark["path"]] = benchmark["median"] * 1e3
    paths = ["ours float32", "ours bfloat16", "ours bfloat16, one expert", "ours int8", "torch factored", "torch dense"]
    batches = (1, 4, 8, 16, 64, 256)
    rows = [[path, *(f"{medians[f'Llama-3-8B q/o, batch {b}'][path]:.2f}" for b in batches)] for path in paths]
    return (
        "One 4096 x 4096 layer on the same machine, a different expert in every row, float32 activations, milliseconds "
        "by batch size (`make bench`; torch in float32; the dense layer has no experts):\n\n"
        + table(["", *(str(b) for b in batches)], rows)
    )


def fidelity() -> str:
    results = read("fidelity.json")
    rows = []
    for label, values in results["z_is_one"].items():
        checks = results["mixed_batch"].get(label.removeprefix("factors, "), [])
        equal, worst = sum(c["equal"] for c in checks), max((c["logit_difference"] for c in checks), default=0)
        rows.append(
            [
                label,
                f"{values['mean_kl']:.1e}" if values["mean_kl"] else "0",
                f"{values['perplexity']:.4f}",
                f"{equal} of {len(checks)}" if checks else "",
                f"{worst:.1e}" if checks else "",
            ]
        )
    head = ["storage", "mean KL at z = 1", "perplexity at z = 1", "rows as merged", "largest logit difference"]
    return (
        f"How far storage formats drift (SmolLM2, {results['tokens']:,} tokens of the {results['text']}; then the 32 "
        "requests with 32 experts, 32 greedy tokens each, against float32 merged models; `benchmarks/fidelity.py`):\n\n"
        + table(head, rows)
    )


def memory() -> str:
    results = read("memory.json")["bytes"]
    base = results["imports only"]
    rows = [
        [name, *(f"{(figures[kind] - base[kind]) / 1e6:,.0f}" for kind in base)]
        for name, figures in results.items()
        if name != "imports only"
    ]
    return (
        "Memory in MB above the imports (`benchmarks/memory.py`). Resident counts mapped model and cache files, which "
        "the system can drop; dense SmolLM2 is served straight from its mapped file.\n\n"
        + table(["process", "peak resident", "peak anonymous", "anonymous at the end"], rows)
    )


SECTIONS = {"demo": demo, "linear": linear, "fidelity": fidelity, "memory": memory}


def rendered(text: str) -> str:
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: expected a section <!-- {name} --> ... <!-- end -->, got none")
        text = pattern.sub(lambda match, section=section: f"{match[1]}{section()}\n{match[2]}", text)
    return text


def main(check: bool = False) -> None:
    """Args:
    check: Compare only.
    """
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rendered(text)
    if check:
        sys.exit(0 if new == text else "README.md is not what benchmarks/results/ says: run benchmarks/readme.py")
    readme.write_text(new)


if __name__ == "__main__":
    tyro.cli(main)
