"""Writes the tables of README.md and docs/ from the JSON files in benchmarks/results/.

python benchmarks/readme.py            # rewrites the sections between <!-- name --> and <!-- end -->
python benchmarks/readme.py --check    # exits 1 if a page is not what the results say
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results_cpu import (
    Linear,
    fastest,
    ratio,
    ratio_at_limits,
    seconds,
    share_of_arithmetic,
    share_of_bandwidth,
)

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
    machine, adapted = results["machine"], results["adaptation"]
    return (
        f"A batch of {adapted['requests']} requests, problems of three domains among other questions, with the bank of "
        f"experts that ships: a first pass gives {adapted['dispatched_right']} of them the expert of their domain "
        f"({adapted['first_seconds']:.2f} s), the second answers ({adapted['second_seconds']:.2f} s); the base alone "
        f"takes {adapted['base_seconds']:.2f} s. Right answers: base {adapted['base_accuracy']:.0%}, adapted "
        f"**{adapted['adapted_accuracy']:.0%}**.\n\n"
        f"What `make demo` measured on {machine['processor']}, {machine['threads']} cores, torch {machine['torch']}, "
        f"{machine['kernels']['chosen']} kernels: SmolLM2-135M-Instruct, {ours['requests']} chat requests in a batch, "
        f"{ours['new_tokens']} new tokens each, {results['dtype']}. All paths in the same run.\n\n"
        + table(head, rows)
        + f"\n\n{results['rows_equal_to_merged_model']} of {ours['requests']} rows give the same 32 greedy tokens as "
        f"their expert merged into a plain model; logits differ by {results['largest_logit_difference']:.1e} at most."
    )


BATCHES = (1, 4, 8, 16, 64, 256)
STORED = ("ours float32", "ours bfloat16", "ours bfloat16, bfloat16 x", "ours float16", "ours int8")
EAGER = "torch factored"
LORA = "PEFT LoRA r=16, mixed"


def linear() -> str:
    results = Linear("cpu-linear.json")
    paths = [*STORED, f"{EAGER} float32", f"{EAGER} bfloat16", "torch dense float32"]
    found = [results.find("test_linear", batch) for batch in BATCHES]
    rows = [[path, *(f"{seconds(result, path) * 1e3:.2f}" for result in found)] for path in paths]
    kernels = results.machine["kernels"]["chosen"]
    return (
        f"One 4096 x 4096 layer with a different expert in every row, {kernels} kernels, milliseconds by number of "
        "rows (`make bench`; the dense layer has no experts):\n\n" + table(["", *(str(b) for b in BATCHES)], rows)
    )


def serving() -> str:
    results = read("cpu-serving.json")
    rows = []
    for requests, paths in results["requests"].items():
        dense = next(path for path in paths if path["name"].startswith("dense"))
        for path in paths:
            ratios = [d / p for d, p in zip(dense["seconds"], path["seconds"], strict=True)]
            decode = [d / p for d, p in zip(dense["step_seconds"], path["step_seconds"], strict=True)]
            rows.append(
                [
                    path["name"],
                    requests,
                    str(path["experts"]),
                    f"{path['tokens_per_second']:.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{path['decode_tokens_per_second']:.0f}",
                    f"{statistics.median(decode):.2f}",
                ]
            )
    head = ["path", "requests", "experts", "tokens/s", "/ dense", "decode tokens/s", "/ dense"]
    return (
        f"SmolLM2-135M-Instruct, prompts of about 40 tokens, {results['new_tokens']} new tokens each, all paths in "
        f"turns (`benchmarks/serving.py`; {results['machine']['kernels']['chosen']} kernels):\n\n" + table(head, rows)
    )


def claims(suffix: str) -> str:
    """Ratios are medians over rounds in which the paths took turns; above 1, ours is faster."""
    results = Linear(f"cpu-linear{suffix}.json")
    ours, wide, int8 = "ours bfloat16, bfloat16 x", "ours bfloat16", "ours int8"
    compiled = (1, 4, 8, 16, 64)
    one_by_batch = {batch: results.find("test_linear", batch) for batch in (*BATCHES, 2)}
    compile_by_batch = {batch: results.find("test_compile", batch) for batch in compiled}

    def over(result: Any, prefixes: list[str], path: str) -> str:
        peer = fastest(result, prefixes)
        return f"{ratio(result, peer, path):.2f} ({peer.rpartition(' ')[2]})"

    def row(label: str, cells: Mapping[int, str]) -> list[str]:
        return [label, *(cells.get(batch, "") for batch in BATCHES)]

    def at_limits(result: Any, prefixes: list[str]) -> str:
        return f"{ratio_at_limits(result, fastest(result, prefixes), ours):.2f}"

    rows = [
        row("bf16 / fastest eager factored", {b: over(one_by_batch[b], [EAGER], ours) for b in BATCHES}),
        row("the same, were ours at the machine's limits", {b: at_limits(one_by_batch[b], [EAGER]) for b in BATCHES}),
        row("bf16 / torch.compile", {b: over(compile_by_batch[b], ["torch.compile"], ours) for b in compiled}),
        row(
            "the same, were ours at the machine's limits",
            {b: at_limits(compile_by_batch[b], ["torch.compile"]) for b in compiled},
        ),
        row("int8 / fastest eager factored", {b: over(one_by_batch[b], [EAGER], int8) for b in BATCHES}),
        row(
            "bf16 / dense float32, one F.linear of W",
            {b: f"{ratio(one_by_batch[b], 'torch dense float32', ours):.2f}" for b in BATCHES},
        ),
        row(
            "bf16 with float32 x / dense float32",
            {b: f"{ratio(one_by_batch[b], 'torch dense float32', wide):.2f}" for b in BATCHES},
        ),
        *(
            row(
                f"share of read bandwidth, {path.removeprefix('ours ')}",
                {b: f"{share_of_bandwidth(one_by_batch[b], path):.0%}" for b in (1, 4, 8)},
            )
            for path in ("ours float32", ours, int8)
        ),
        *(
            row(
                f"share of multiply-add peak, {path.removeprefix('ours ')}",
                {b: f"{share_of_arithmetic(one_by_batch[b], path):.0%}" for b in (16, 64, 256)},
            )
            for path in STORED
        ),
    ]
    measured_on = machine_and_limits(results.machine, list(one_by_batch.values()))
    return measured_on + "\n\n" + table(["4096 x 4096, by number of rows", *(str(b) for b in BATCHES)], rows)


def machine_and_limits(machine: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> str:
    """Where these measurements were made, and what the machine managed meanwhile."""
    kinds = ("read", "float32", "bfloat16", "int16")
    rates = {kind: [rate for result in measured for rate in result["rates"][kind]] for kind in kinds}
    limits = {kind: statistics.median(found) for kind, found in rates.items() if found}
    flops = ", ".join(f"{2 * rate / 1e9:.0f} {kind}" for kind, rate in limits.items() if kind != "read")
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['kernels']['chosen']} kernels. Limits in the same run: {limits['read'] / 1e9:.0f} GB/s read; "
        f"GFLOP/s {flops}."
    )


def experts() -> str:
    experts = Linear("cpu-experts.json")
    ours, wide, int8 = "ours bfloat16, bfloat16 x", "ours bfloat16", "ours int8"
    popularity = experts.find("test_popularity", 64)
    several = [
        [
            kind,
            *(
                f"{ratio(result, peer, path):.1f}" if peer in result["seconds"] else ""
                for peer, path in (
                    (LORA, wide),
                    (LORA, ours),
                    (LORA, int8),
                    ("W' rebuilt per expert", ours),
                    ("eigentune, full rank", ours),
                )
            ),
            f"{ratio(popularity, f'ours bfloat16, {kind}', 'ours bfloat16, identical'):.3f}",
        ]
        for kind in ("distinct", "zipf", "uniform", "identical")
        for result in [experts.find("test_multi_expert", 32, popularity=kind)]
    ]
    head = [
        "experts of 32 requests",
        "PEFT mixed / ours bf16 with float32 x",
        "/ ours bf16",
        "/ ours int8",
        "W' rebuilt / ours bf16",
        "eigentune / ours bf16",
        "64 rows: time / time with one expert",
    ]
    measured_on = machine_and_limits(experts.machine, experts.data["benchmarks"])
    return measured_on + "\n\n" + table(head, several)


def shapes() -> str:
    results = Linear("cpu-linear.json")
    rows = []
    for shape in results.shapes():
        for path in ("ours bfloat16, bfloat16 x", "ours float16", "ours int8"):
            cells = []
            for batch in (1, 4, 16, 64, 256, 1024):
                result = results.find("test_linear", batch, shape)
                eager = ratio(result, fastest(result, [EAGER]), path)
                cells.append(f"{seconds(result, path) * 1e3:.3g} ({eager:.1f}x)")
            rows.append([f"{shape}: {path.removeprefix('ours ')}", *cells])
    return "Milliseconds, and the fastest eager torch path over ours:\n\n" + table(
        ["", "1", "4", "16", "64", "256", "1024"], rows
    )


def attention() -> str:
    results = read("cpu-attention.json")
    rows = []
    for result in results["benchmarks"]:
        ours, peer = "ours", "transformers sdpa"
        pairs = zip(result["seconds"][ours], result["rates"]["read"], strict=True)
        share = statistics.median(result["bytes"] / s / rate for s, rate in pairs)
        cells = (f"{seconds(result, path) / result['layers'] * 1e3:.3g}" for path in (ours, peer))
        label = f"{result['shape']}, {result['length']} tokens kept"
        rows.append([label, str(result["batch"]), *cells, f"{ratio(result, peer, ours):.1f}x", f"{share:.0%}"])
    return (
        "Attention and cache of a decode step, milliseconds a layer (`benchmarks/bench_attention.py`). "
        + machine_and_limits(results["machine_info"], results["benchmarks"])
        + "\n\n"
        + table(["", "rows", "ours", "transformers sdpa", "sdpa / ours", "share of read bandwidth"], rows)
    )


def plans() -> str:
    explained = read("cpu-plan.json")["explained"]
    return "\n\n".join(f"{label}:\n\n```\n{text}\n```" for label, text in explained.items())


def backward() -> str:
    results = Linear("cpu-linear.json")
    rows = []
    for shape in results.shapes():
        cells = []
        for batch in (64, 512, 2048):
            result = results.find("test_backward", batch, shape)
            cells += [
                f"{ratio(result, 'torch float32', path):.2f}" for path in ("ours float32", "ours bfloat16", "ours int8")
            ]
        rows.append([shape, *cells])
    head = [f"{rows_} rows, {kind}" for rows_ in (64, 512, 2048) for kind in ("fp32", "bf16", "int8")]
    return "Time of torch's two products on row-major float32 factors over ours:\n\n" + table(["", *head], rows)


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


GPU = "gpu-h200.json"
GPU_GROUPS = ("q, k, v", "o", "gate, up", "down")


def gpu_timing(group: str, case: str, path: str) -> float | None:
    """Seconds of one call, if it was measured."""
    found = read(GPU).get(f"{group} | {case} | {path}", {})
    return found.get("seconds")


def microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def gpu_machine() -> str:
    data = read(GPU)
    machine, limits, tests = data["environment"], data["ceilings"], data["tests"]
    checks = [found for name, found in data.items() if name.startswith("correct | ")]
    right = sum(found["right"] for found in checks)
    return (
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}: a copy moves "
        f"{limits['copy'] / 1e12:.2f} TB/s (read and written), a sum reads {limits['sum'] / 1e12:.2f} TB/s, a "
        f"bfloat16 product of side 8192 runs at {limits['bfloat16'] / 1e12:.0f} TFLOP/s. {right} of {len(checks)} "
        f"checks against float64 right; `pytest -m gpu`: {' '.join(tests['summary']).strip('= ')}; compute-sanitizer "
        f"on a group and a backward pass: {'no error' if data['sanitizer'].get('status') == 0 else data['sanitizer']}."
    )


def gpu_decode() -> str:
    """Both launches of a group; shares are of the copy bandwidth, by the bytes of the factors (or of W)."""
    data = read(GPU)
    rows = []
    for group in GPU_GROUPS:
        size = data[f"bytes | {group}"]
        for count in (1, 8, 16, 32, 64):
            cells = []
            for path, bytes_read in (
                ("ours bfloat16", size["bfloat16"]),
                ("ours int8", size["bfloat16"] * 33 / 64),
                ("dense cuBLAS", size["dense"]),
            ):
                seconds = gpu_timing(group, f"decode {count}", path)
                share = "" if seconds is None else f" ({bytes_read / seconds / data['ceilings']['copy']:.0%})"
                cells.append(microseconds(seconds) + share)
            others = (gpu_timing(group, f"decode {count}", path) for path in ("torch factored", "multi-LoRA gathered"))
            rows.append([group, str(count), *cells, *map(microseconds, others)])
    head = ["layers", "rows", "ours bfloat16", "ours int8", "dense cuBLAS", "torch factored", "gathered LoRA r=16"]
    return "Microseconds, as many experts as rows (share of the copy bandwidth):\n\n" + table(head, rows)


def gpu_prefill() -> str:
    rows = []
    for group in GPU_GROUPS:
        ours, products = (gpu_timing(group, "prefill 2048", path) for path in ("ours bfloat16", "two cuBLAS products"))
        back, back_cublas = (gpu_timing(group, "backward 2048", path) for path in ("ours bfloat16", "cuBLAS"))
        assert ours and products and back and back_cublas
        others = (gpu_timing(group, "prefill 2048", path) for path in ("ours int8", "torch factored", "dense cuBLAS"))
        rows.append(
            [
                group,
                microseconds(ours),
                f"{products / ours:.2f}",
                *map(microseconds, others),
                microseconds(back),
                f"{back_cublas / back:.2f}",
            ]
        )
    head = [
        "layers",
        "ours bfloat16",
        "two cuBLAS products / ours",
        "ours int8",
        "torch factored",
        "dense cuBLAS",
        "backward, ours bfloat16",
        "cuBLAS / ours",
    ]
    return "2,048 rows, microseconds:\n\n" + table(head, rows)


def gpu_experts() -> str:
    rows = []
    for group in GPU_GROUPS:
        one, many = (gpu_timing(group, f"popularity 64 {kind}", "ours bfloat16") for kind in ("identical", "distinct"))
        small, large = (gpu_timing(group, f"table of {count}", "ours bfloat16") for count in (1, 1024))
        assert one and many and small and large
        rows.append([group, microseconds(one), f"{many / one:.3f}", f"{large / small:.3f}"])
    head = ["layers", "64 rows, one expert", "64 distinct / one", "a table of 1,024 / of 1"]
    return "Microseconds, bfloat16 factors:\n\n" + table(head, rows)


def gpu_end_to_end() -> str:
    data, rows = read(GPU), []
    paths = ("dense bf16", "ours bf16", "ours int8", "ours fp8", "gathered LoRA")
    cases = {
        "decode 1": "1 row",
        "decode 8": "8 rows",
        "decode 32": "32 rows",
        "eager 32": "32 rows, eager",
        "prefill 2048": "prefill of 2,048 tokens",
    }
    for case, meaning in cases.items():
        found = [data.get(f"end to end | {case} | {path}", {}).get("seconds") for path in paths]
        rows.append([meaning, *("" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in found)])
    return (
        "Llama-3-8B's shapes, 32 layers with random weights, a static cache of 512 positions; a CUDA graph of the "
        "step but where it says eager. Every row has an expert, or an adapter, of its own. Milliseconds:\n\n"
        + table(["", *paths], rows)
    )


def training_speed() -> str:
    results = read("training-speed.json")
    machine = results["machine"]
    rows = [
        [
            name,
            f"{found['trainable']:,}",
            f"{statistics.median(found['seconds']):.1f}",
            f"{statistics.median(found['rollout_seconds']):.1f}",
            f"{found['over_svf']:.2f}",
            f"{found['peak_anonymous_bytes'] / 1e6:,.0f}",
        ]
        for name, found in results["methods"].items()
    ]
    head = ["method", "numbers learnt", "s a step", "of it answers", "this / SVF", "peak anonymous, MB"]
    return (
        f"One step of SmolLM2-135M-Instruct: {results['rollouts']} answers of {results['new_tokens']} tokens and the "
        f"update with its exact KL, float32 unless it says otherwise, {machine['threads']} cores of "
        f"{machine['processor']}; processes that take turns, median of {results['rounds']}; weights in use are in the "
        "peak, mapped files are not (`python benchmarks/training_speed.py`):\n\n" + table(head, rows)
    )


def experts_trained() -> str:
    """One row for each expert that was trained."""
    results = read("training.json")
    rows = []
    for name, run in results["runs"].items():
        if name.startswith("compare-"):
            continue
        scores = [run["curve"][0]["base"], *(row["validation"] for row in run["curve"] if "validation" in row)]
        rows.append(
            [
                name,
                percent(run["base"]),
                f"**{percent(run['best'])}**",
                f"{run['best']['step']} of {run['steps']}",
                f"{run['majority']:.0%}",
                f"{max(scores):.0%}, {scores[-1]:.0%}",
                f"{run['training_seconds'] / 60:.1f}",
            ]
        )
    head = ["task and seed", "base", "trained", "best step", "one answer", "validation: best, last", "minutes"]
    machine, settings = results["machine"], next(iter(results["runs"].values()))
    return (
        f"Right answers to {settings['test_problems']} test problems with 95% intervals; base and expert with the same "
        f'storage, {settings["options"]["dtype"]}; "one answer" is what the commonest one would get right. '
        f"{machine['threads']} cores of {machine['processor']} (`python benchmarks/train_experts.py`):\n\n"
        + table(head, rows)
    )


def experts_compared() -> str:
    """One row for each variant, its seeds side by side."""
    results = read("training.json")["runs"]
    seconds = {name: read("training-speed.json")["methods"][of] for name, of in METHOD_OF.items()}
    variants: dict[str, list[dict[str, Any]]] = {}
    for name, run in results.items():
        if name.startswith("compare-"):
            variants.setdefault(name.removeprefix("compare-").rpartition("-")[0], []).append(run)
    rows = [
        [
            NAME_OF[name],
            ", ".join(f"{run['best']['accuracy']:.1%}" for run in runs),
            f"{runs[0]['trainable']:,}",
            f"{statistics.median(seconds[name]['seconds']):.1f}" if name in seconds else "",
            f"{seconds[name]['peak_anonymous_bytes'] / 1e6:,.0f}" if name in seconds else "",
        ]
        for name, runs in variants.items()
    ]
    options = next(iter(variants.values()))[0]["options"]
    head = ["trained", "right, by seed", "numbers learnt", "s a step", "peak, MB"]
    return (
        f"{options['steps']} steps of {options['prompts_per_step']} prompts, {options['cold_start_steps']} of them on "
        f"solutions where both are used, else {options['samples_per_prompt']} answers a prompt; "
        "the base has "
        f"{next(iter(variants.values()))[0]['base']['accuracy']:.1%}. Seconds and memory as above, where the methods "
        "took turns:\n\n" + table(head, rows)
    )


NAME_OF = {
    "svf": "SVF, all layers",
    "lora": "LoRA r=16 (PEFT), all layers",
    "mlp": "SVF, MLP alone",
    "attention": "SVF, attention alone",
    "rewards-alone": "SVF, rewards alone",
    "solutions-alone": "SVF, solutions alone",
}
METHOD_OF = {"svf": "SVF, bfloat16 factors and products", "lora": "LoRA r=16 (PEFT)"}


def percent(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} ({100 * low:.0f} to {100 * high:.0f})"


def sandbox() -> str:
    """One row for each program: what happened under the first tool, and whether each of them stopped it."""
    results = read("sandbox.json")
    tools = list(results["hello_seconds"])
    found = {(each["program"], each["backend"]): each for each in results["programs"]}

    def verdict(program: str, tool: str) -> str:
        broken = found[program, tool]["broken"]
        return f"**NOT STOPPED**: {'; '.join(broken)}" if broken else "stopped"

    programs = list(dict.fromkeys(each["program"] for each in results["programs"]))
    rows = [
        [program, *(verdict(program, tool) for tool in tools), found[program, tools[0]]["happened"]]
        for program in programs
    ]
    hello = ", ".join(f"{seconds * 1000:.0f} ms ({tool})" for tool, seconds in results["hello_seconds"].items())
    return (
        f"{results['machine']['processor']}; a program that prints one line takes {hello}. What happened is told by "
        f"the program itself, or by who killed it:\n\n" + table(["program", *tools, "what happened"], rows)
    )


def humaneval() -> str:
    results = read("humaneval.json")
    passed, count = len(results["passed"]), results["problems"]
    row = [
        f"{results['model']}, {results['dtype']}",
        f"{results['pass_at_1']:.1%} ({passed} of {count})",
        f"{results['generation_seconds']:.0f}",
        f"{results['running_seconds']:.0f}",
        f"{results['canonical_solutions_passed']} of {count}, {results['canonical_running_seconds']:.0f} s",
    ]
    head = ["model", "pass@1", "seconds to generate", "seconds to run", "canonical solutions"]
    return (
        f"Greedy, at most {results['new_tokens']} new tokens ({results['answers_cut_off']} answers reach that), "
        f"{results['machine']['processor']}, {results['machine']['threads']} threads; {results['timeout']:g} s a "
        f"program, {results['sandbox']}:\n\n" + table(head, [row])
    )


def transfer() -> str:
    results = read("transfer.json")
    settings, rows = results["settings"], []

    def cell(found: Mapping[str, Any]) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"

    for name, base in ((name, base) for name in settings["experts"] for base in results["bases"]):
        found = results["bases"][base]
        if name not in found["experts"]:
            continue
        conditions = dict(found["experts"][name]["conditions"])
        alone, ordered = (cell(conditions.pop(key)) for key in ("base", "ordered"))
        lines_up = found["lines_up"]
        same = [statistics.mean(kind["same"]) for kind in lines_up["vectors"].values()] if lines_up else []
        near = [statistics.mean(kind["near"]) for kind in lines_up["vectors"].values()] if lines_up else []
        vectors = [f"{statistics.mean(same):.2f}", f"{statistics.mean(near):.2f}"] if lines_up else ["", ""]
        change = f"{lines_up['changes'][name]['ordered']:.2f}" if lines_up else ""
        shuffled = ", ".join(f"{each['accuracy']:.1%}" for each in conditions.values())
        rows.append([f"{name}, {base}", alone, ordered, shuffled, *vectors, change])
    trained = "; ".join(
        f"{name} on {each['task']}, {each['objective']} objective, {each['step']} steps of "
        f"{each['prompts_per_step']} prompts"
        for name, each in settings["experts"].items()
    )
    bases = " ".join(json.dumps(base) for base in results["bases"])
    head = ["expert, base", "base alone", "ordered", "shuffled, each", "same vectors", "near", "same change"]
    return (
        f"Experts of {settings['model']} on {settings['problems']} test problems ({trained}), right answers with 95% "
        f"intervals (`python benchmarks/transfer.py EXPERT ... --problems {settings['problems']} --shuffles "
        f"{settings['shuffles']} --bases {bases}`):\n\n" + table(head, rows)
    )


def adaptation() -> str:
    """The tables of `t2 eval`, if they were made: eval.json is its summary.json."""
    if not (RESULTS / "eval.json").is_file():
        return ""
    from t2.eval.report import TITLES, tables

    results = read("eval.json")
    machine = results["machine"]
    products = ", bfloat16 products" if results["bf16_products"] else ""
    sections = [f"### {TITLES[name]}\n\n{text}" for name, text in tables(results).items()]
    return (
        f"{results['model']}, {results['dtype']}{products}, on {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}:\n\n" + "\n\n".join(sections)
    )


def fewshot_speed() -> str:
    """The search in one batch beside W' built for one candidate after the other, and whether they come to the same."""
    results = read("fewshot-speed.json")
    machine, rows = results["machine"], []
    for way, times in results["seconds"].items():
        over = [ratios[way] for ratios in results["ratios_to"].values()]
        agreed = results["agreement_with_one_batch"].get(way)
        same = ""
        if agreed is not None:
            tokens, common = (sum(each[key] for each in agreed) for key in ("same_tokens", "answers_in_common"))
            same = f"{tokens:,} of {common:,}; {sum(each['same_alpha'] for each in agreed)} of {len(agreed)}"
        rows.append([way, f"{statistics.median(times):.1f}", *(f"{statistics.median(o):.1f}" for o in over), same])
    head = ["way", "s a search", *(f"over {ours}" for ours in results["ratios_to"]), "same answers; same mix"]
    return (
        f"{results['population']} candidates of {results['experts']} experts a generation, {results['generations']} "
        f"generations, {results['problems']} problems of chain_sum; medians of {len(times)} searches, each with its "
        f"own seed, ways taking turns, {machine['threads']} cores of {machine['processor']} "
        "(`python benchmarks/fewshot_speed.py --bank t2/banks/smollm2-135m-instruct`):\n\n" + table(head, rows)
    )


def margins() -> str:
    """What a search's choice by few problems is worth on the others of the task, by its margin and incumbent."""
    results, rows = read("margin.json"), []
    for row in results["rows"]:
        gain, below = (statistics.fmean(row[key].values()) for key in ("gain", "below"))
        gains = [
            f"{100 * gain:+.1f}, {100 * below:.0f}%"
            for gain, below in zip(row["gain"].values(), row["below"].values(), strict=True)
        ]
        rows.append(
            [
                str(row["problems"]),
                f"{row['margin']:g}",
                row["incumbent"],
                f"{100 * gain:+.1f}",
                f"{100 * below:.0f}%",
                *gains,
            ]
        )
    settings, tasks = results["settings"], results["tasks"]
    head = ["few-shot problems", "margin", "incumbent", "points above the base", "draws below it", *tasks]
    return (
        f"{settings['candidates']} mixes, {settings['problems']} problems of each task, {settings['draws']:,} draws of "
        "a few of them; the choice is judged on the others. Mean over tasks, then each (`python benchmarks/margin.py`):"
        "\n\n" + table(head, rows)
    )


PLANNED = {"Llama-3-8B": "plan-llama-3-8b.json", "Llama-3-70B": "plan-llama-3-70b.json"}


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}"


def big_plans() -> str:
    """What either model takes, and where it fits, by `t2 estimate`."""
    plans = {name: read(file) for name, file in PLANNED.items()}
    rows = [
        ["parameters per expert", *(f"{p['parameters_per_expert']:,}" for p in plans.values())],
        ["multiply-adds over dense", *(f"{p['multiply_adds']:.3f}" for p in plans.values())],
        ["factor cache on disk, GB", *(gigabytes(p["disk"]) for p in plans.values())],
        ["memory while decomposing, GB", *(gigabytes(p["decompose"]["peak"]) for p in plans.values())],
    ]
    for storage in ("float32", "bfloat16", "int8"):
        rows.append(
            [f"factors in {storage}, GB", *(gigabytes(p["storage"][storage]["factors"]) for p in plans.values())]
        )
    rows.append(["int8, ready to serve, GB", *(gigabytes(p["storage"]["int8"]["serving"]) for p in plans.values())])
    rows.append(["cache of one token, MB", *(f"{p['cache_per_token'] / 1e6:.2f}" for p in plans.values())])
    for place in range(4):
        gpus = [p["storage"]["int8"]["gpus"][place] for p in plans.values()]
        rows.append([f"int8 on {gpus[0]['gb']} GB: token budget", *map(largest_budget, gpus)])
    work = next(iter(plans.values()))["work"]
    return (
        f"Models of bfloat16; a step of {work['prompts_per_step']} prompts of {work['prompt_tokens']} tokens with "
        f"{work['samples_per_prompt']} answers of {work['new_tokens']}. Token budgets are the largest that fit, "
        "without and with `--gradient-checkpointing`:\n\n" + table(["", *plans], rows)
    )


def largest_budget(gpu: dict[str, Any]) -> str:
    plain, again = gpu["token_budget"], gpu["token_budget_checkpointing"]
    if again is None:
        return f"needs {gpu['gpus_to_train']} GPUs"
    return f"{'none' if plain is None else f'{plain:,}'} / {again:,}"


def big_model() -> str:
    """Measured beside planned, for the stacks and extrapolated to all layers."""
    results = read("big-model.json")
    found, work = results["decompose"], results["work"]
    rows = [
        ["decomposing one layer's matrices", "1", f"{found['peak'] / 1e9:.2f}", f"{found['planned_peak'] / 1e9:.2f}"]
    ]
    for layers, run in results["train"]["runs"].items():
        rows.append(["loading", layers, f"{run['loading_peak'] / 1e9:.2f}", ""])
    named = {"loaded": "loaded, int8", "rollout_peak": "drawing answers", "update_peak": "update"}
    for run, suffix in (("train", ""), ("train, layers run again", ", layers run again")):
        for figure, label in named.items():
            if suffix and figure != "update_peak":
                continue
            entry = results[run]["memory"][figure]
            for layers, measured in entry["measured"].items():
                planned = entry["planned"][layers]
                shown = f"{layers} (by what a layer adds)" if layers == "32" else layers
                rows.append([label + suffix, shown, f"{measured / 1e9:.2f}", f"{planned / 1e9:.2f}"])
    return (
        f"Random weights in Llama-3-8B's shapes, vocabulary {results['vocabulary']:,}, on "
        f"{results['machine']['processor']}: {work['prompts_per_step']} prompts of {work['prompt_tokens']} tokens with "
        f"{work['samples_per_prompt']} answers of {work['new_tokens']}, all in one micro-batch "
        "(`python benchmarks/big_model.py`). Anonymous memory above the imports, without the embeddings, which stay "
        "mapped from their file:\n\n" + table(["phase", "layers", "measured, GB", "planned, GB"], rows)
    )


def versions() -> str:
    rows = read("versions.json")
    torches = sorted({row["torch"] for row in rows}, key=lambda name: [int(part) for part in name.split(".")])
    cells = {(row["python"], row["torch"]): row for row in rows}

    def cell(python: str, torch: str) -> str:
        row = cells.get((python, torch))
        if row is None:
            return ""
        return row["tests"].partition(",")[0] if row["result"] == "passed" else row["result"][:80].replace("|", "/")

    pythons = sorted({row["python"] for row in rows}, key=lambda name: [int(part) for part in name.split(".")])
    body = [[f"Python {python}", *(cell(python, torch) for torch in torches)] for python in pythons]
    return table(["", *(f"torch {torch}" for torch in torches)], body)


def families() -> str:
    found = read("families.json")
    built = [each for each in found["families"] if each["built"] == "ok"]
    refused = [each for each in built if each["wrapped"] != "ok"]
    whole = [each for each in built if each["wrapped"] == "ok" and each["share"] >= 0.9]
    partly = [each for each in built if each["wrapped"] == "ok" and each["share"] < 0.9]
    missing = [each for each in found["families"] if each["built"] != "ok"]
    wrong = [each for each in built if any(came.startswith("wrong") for came in each["checks"].values())]
    intro = (
        f"With transformers {found['transformers']}, {len(built)} of {len(found['families'])} families could be built: "
        f"{len(whole)} are decomposed whole (at least 90% of their blocks' weights), {len(partly)} in part, "
        f"{len(refused)} are refused; {len(wrong)} answer wrongly. The shares of a tiny model's parts are not those of "
        "a large one: of Qwen3-30B-A3B's blocks 3% can be decomposed."
    )
    rows = [
        [f"`{each['family']}`", family_verdict(each), f"{each['share']:.0%}", family_notes(each)]
        for each in sorted(built, key=lambda each: each["family"])
    ]
    rest = ", ".join(f"`{each['family']}`" for each in missing)
    return f"{intro}\n\n{table(['family', 'verdict', 'decomposed', 'notes'], rows)}\n\nNot built tiny: {rest}."


def family_verdict(found: Mapping[str, Any]) -> str:
    if any(came.startswith("wrong") for came in found["checks"].values()):
        return "**wrong**"
    if found["wrapped"] != "ok":
        return "refused"
    return "whole" if found["share"] >= 0.9 else "in part"


def family_notes(found: Mapping[str, Any]) -> str:
    notes = []
    if found["wrapped"] != "ok":
        notes.append(found["wrapped"].partition("wrapped: ")[2].partition(". It is as it was")[0])
    elif found["share"] < 0.9:
        total = sum(found["dense"].values()) / (1 - found["share"])
        largest = sorted(found["dense"].items(), key=lambda item: (-item[1], item[0]))[:2]
        notes.append("dense: " + ", ".join(f"`{name}` {size / total:.0%}" for name, size in largest))
    notes += [f"{name}: {came}" for name, came in found["checks"].items() if came != "ok"]
    return "; ".join(note[:160].replace("|", "/") for note in notes)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo": demo, "linear": linear, "serving": serving, "fidelity": fidelity, "memory": memory},
    "docs/adaptation.md": {"fewshot-speed": fewshot_speed, "margin": margins, "eval": adaptation},
    "docs/big-models.md": {"big-plans": big_plans, "big-model": big_model},
    "docs/cpu.md": {
        "claims": lambda: claims(""),
        "claims-avx2": lambda: claims("-avx2"),
        "experts": experts,
        "shapes": shapes,
        "backward": backward,
        "attention": attention,
        "plans": plans,
    },
    "docs/gpu.md": {
        "gpu-machine": gpu_machine,
        "gpu-decode": gpu_decode,
        "gpu-prefill": gpu_prefill,
        "gpu-experts": gpu_experts,
        "gpu-end-to-end": gpu_end_to_end,
    },
    "docs/training.md": {
        "experts-trained": experts_trained,
        "training-speed": training_speed,
        "experts-compared": experts_compared,
    },
    "docs/transfer.md": {"transfer": transfer},
    "docs/models.md": {"families": families},
    "CONTRIBUTING.md": {"versions": versions},
    "docs/tasks.md": {"sandbox": sandbox, "humaneval": humaneval},
}


def rendered(page: str) -> str:
    text = (ROOT / page).read_text()
    for name, section in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page}: expected a section <!-- {name} --> ... <!-- end -->, got none")
        text = pattern.sub(lambda match, section=section: f"{match[1]}{section()}\n{match[2]}", text)
    return text


def main(check: bool = False) -> None:
    """Args:
    check: Compare only.
    """
    pages = {page: rendered(page) for page in PAGES}
    stale = [page for page, text in pages.items() if text != (ROOT / page).read_text()]
    if check:
        sys.exit(f"not what benchmarks/results/ says: {', '.join(stale)}; run benchmarks/readme.py" if stale else 0)
    for page in stale:
        (ROOT / page).write_text(pages[page])


if __name__ == "__main__":
    tyro.cli(main)
