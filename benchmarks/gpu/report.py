"""Tables of a GPU run: those of docs/gpu.md, and tables.md with everything in results.json."""

from __future__ import annotations

from typing import Any

from benchmarks.common.tables import Table

Data = dict[str, Any]
"""Content of results.json: measurements by name, such as "o | decode 1 | ours int8"."""
GROUPS = ("q, k, v", "o", "gate, up", "down")
WHOLE_MODEL = ("end to end", "peft", "rl step", "generate")


def seconds(data: Data, *name: str) -> float | None:
    """Seconds of one call, None if it was not measured."""
    found: float | None = data.get(" | ".join(name), {}).get("seconds")
    return found


def measured(data: Data, *name: str) -> float:
    """Seconds of one call; KeyError if it was not measured."""
    found = seconds(data, *name)
    if found is None:
        raise KeyError(" | ".join(name))
    return found


def microseconds(found: float | None) -> str:
    return "" if found is None else f"{found * 1e6:.1f}"


def share_of_copy(data: Data, group: str, case: str, path: str) -> float | None:
    """Share of the copy bandwidth that a call reads weights with: factors, or W in dense and LoRA paths."""
    found, size = seconds(data, group, case, path), data.get(f"bytes | {group}", {})
    if found is None or "bfloat16" not in size or "copy" not in data.get("ceilings", {}):
        return None
    read = size["dense"] if "dense" in path or "LoRA" in path else size["bfloat16"]
    if "int8" in path or "float8" in path:
        read *= 33 / 64  # the leading components in float16, 1/32 of them
    copy: float = data["ceilings"]["copy"]
    return float(read / found / copy)


def with_share(data: Data, group: str, case: str, path: str) -> str:
    """Cell like "30.3 (68%)": microseconds and the share of the copy bandwidth."""
    share = share_of_copy(data, group, case, path)
    return microseconds(seconds(data, group, case, path)) + ("" if share is None else f" ({share:.0%})")


def checks(data: Data) -> tuple[list[str], int]:
    """(names of checks against float64 that failed, number of checks)."""
    found = {name: each for name, each in data.items() if name.startswith("correct | ")}
    return [name for name, each in found.items() if not each.get("right")], len(found)


def limits(data: Data) -> str:
    ceilings = data["ceilings"]
    return (
        f"a copy moves {ceilings['copy'] / 1e12:.2f} TB/s (read and written), a sum reads {ceilings['sum'] / 1e12:.2f} "
        f"TB/s, a bfloat16 product of side 8192 runs at {ceilings['bfloat16'] / 1e12:.0f} TFLOP/s"
    )


def machine_text(data: Data) -> Table:
    """GPU, software, limits and test outcomes."""
    machine, tests, (wrong, count) = data["environment"], data["tests"], checks(data)
    return Table(
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}: {limits(data)}. "
        f"{count - len(wrong)} of {count} checks against float64 right; "
        f"`pytest -m gpu`: {' '.join(tests['summary']).strip('= ')}; compute-sanitizer "
        f"on a group and a backward pass: {'no error' if data['sanitizer'].get('status') == 0 else data['sanitizer']}."
    )


def decode_table(data: Data) -> Table:
    """Both launches of a group of layers, by number of rows."""
    shared, plain = ("ours bfloat16", "ours int8", "dense cuBLAS"), ("torch factored", "multi-LoRA gathered")
    rows = []
    for group in GROUPS:
        for count in (1, 8, 16, 32, 64):
            case = f"decode {count}"
            cells = [with_share(data, group, case, path) for path in shared]
            cells += [microseconds(seconds(data, group, case, path)) for path in plain]
            rows.append([group, str(count), *cells])
    return Table(
        "Microseconds, as many experts as rows (share of the copy bandwidth):",
        ["layers", "rows", *shared, plain[0], "gathered LoRA r=16"],
        rows,
    )


def prefill_table(data: Data) -> Table:
    """Forward and backward pass of 2,048 rows."""
    rows = []
    for group in GROUPS:
        ours = measured(data, group, "prefill 2048", "ours bfloat16")
        back = measured(data, group, "backward 2048", "ours bfloat16")
        paths = ("ours int8", "torch factored", "dense cuBLAS")
        rows.append(
            [
                group,
                microseconds(ours),
                f"{measured(data, group, 'prefill 2048', 'two cuBLAS products') / ours:.2f}",
                *(microseconds(seconds(data, group, "prefill 2048", path)) for path in paths),
                microseconds(back),
                f"{measured(data, group, 'backward 2048', 'cuBLAS') / back:.2f}",
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
    return Table("2,048 rows, microseconds:", head, rows)


def expert_ratios(data: Data, group: str) -> tuple[float, float]:
    """Times of 64 distinct experts over one expert, and of a table of 1,024 experts over a table of one."""
    one, many, small, large = (
        measured(data, group, case, "ours bfloat16")
        for case in ("popularity 64 identical", "popularity 64 distinct", "table of 1", "table of 1024")
    )
    return many / one, large / small


def experts_table(data: Data) -> Table:
    """Cost of many experts in a batch, and of many in the table."""
    rows = []
    for group in GROUPS:
        one = seconds(data, group, "popularity 64 identical", "ours bfloat16")
        rows.append([group, microseconds(one), *(f"{ratio:.3f}" for ratio in expert_ratios(data, group))])
    head = ["layers", "64 rows, one expert", "64 distinct / one", "a table of 1,024 / of 1"]
    return Table("Microseconds, bfloat16 factors:", head, rows)


def end_to_end_table(data: Data) -> Table:
    """Decode steps and prefill of a whole model."""
    paths = ("dense bf16", "ours bf16", "ours int8", "ours fp8", "gathered LoRA")
    cases = {
        "decode 1": "1 row",
        "decode 8": "8 rows",
        "decode 32": "32 rows",
        "eager 32": "32 rows, eager",
        "prefill 2048": "prefill of 2,048 tokens",
    }
    rows = []
    for case, meaning in cases.items():
        found = [seconds(data, "end to end", case, path) for path in paths]
        rows.append([meaning, *("" if each is None else f"{each * 1e3:.2f}" for each in found)])
    return Table(
        "Llama-3-8B's shapes, 32 layers with random weights, a static cache of 512 positions; a CUDA graph of the "
        "step but where it says eager. Every row has an expert, or an adapter, of its own. Milliseconds:",
        ["", *paths],
        rows,
    )


def predictions_table(data: Data) -> Table:
    """Measurements beside what was predicted before the first run on a GPU."""
    paths = ("dense bf16", "ours bf16", "ours int8", "gathered LoRA")
    dense, bf16, int8, lora = (measured(data, "end to end", "decode 32", path) for path in paths)
    wide, square, cublas = (
        share_of_copy(data, group, "decode 32", path) or 0.0
        for group, path in (("gate, up", "ours bfloat16"), ("o", "ours bfloat16"), ("o", "dense cuBLAS"))
    )
    prefill = [
        measured(data, group, "prefill 2048", "two cuBLAS products")
        / measured(data, group, "prefill 2048", "ours bfloat16")
        for group in GROUPS
    ]
    distinct, table = (max(ratios) for ratios in zip(*(expert_ratios(data, group) for group in GROUPS), strict=True))
    peft, eager = (measured(data, "peft, 8 layers", "eager 32", path) for path in ("PEFT mixed", "ours bf16"))
    memory = data["rl step"]
    peak = memory["bytes"]["update_peak"] / memory["planned_bytes"]["update_peak"]
    return Table(
        head=[f"on an {data['environment']['device'].removeprefix('NVIDIA ')}", "measured", "expected"],
        rows=[
            ["gate and up, bfloat16, 32 rows: share of the copy bandwidth", f"{wide:.0%}", "85%"],
            [f"4096 x 4096, bfloat16, 32 rows: the same (one cuBLAS product: {cublas:.0%})", f"{square:.0%}", "85%"],
            [
                "prefill of 2,048 rows: two cuBLAS products / ours",
                f"{min(prefill):.2f} to {max(prefill):.2f}",
                "0.90",
            ],
            ["64 distinct experts / one; a table of 1,024 / of 1 (at most)", f"{distinct:.2f}; {table:.2f}", "1.02"],
            ["one decode step, 32 rows, dense bf16 / ours int8", f"{dense / int8:.2f}", "1.2"],
            ["8 layers, 32 rows, PEFT's mixed batch / ours, both eager", f"{peft / eager:.0f}", "10"],
            [
                "one decode step, 32 rows, gathered LoRA / ours (bf16; int8)",
                f"{lora / bf16:.2f}; {lora / int8:.2f}",
                "1.3",
            ],
            ["a step of REINFORCE, int8, peak memory / plan", f"{peak:.2f}", "0.9 to 1.1"],
        ],
    )


# All of results.json


def report(data: Data) -> str:
    """Everything in results.json as markdown: microseconds, and shares of the measured copy bandwidth."""
    machine, (wrong, count) = data.get("environment", {}), checks(data)
    parts = [
        f"# {machine.get('device', 'CPU')}",
        f"torch {machine.get('torch')}, Triton {machine.get('triton')}.",
        f"{limits(data)}." if "copy" in data.get("ceilings", {}) else "",
        "\n".join(
            f"- {name.removeprefix('stage | ')}: {found['ended']}, {found['took']} s"
            for name, found in data.items()
            if name.startswith("stage | ")
        ),
        f"{count - len(wrong)} of {count} checks against float64 right. {'; '.join(wrong)}",
        f"tests: {data['tests']}" if "tests" in data else "",
        *(f"## {group}\n\n{table.markdown()}" for group, table in kernel_tables(data).items()),
        tile_lines(data),
    ]
    whole = [f"- {name}: {_short(found)}" for name, found in data.items() if name.startswith(WHOLE_MODEL)]
    parts.append("## End to end\n\n" + "\n".join(whole) if whole else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def _short(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    if "error" in found:
        return f"failed: {found['error'][:200]}"
    return ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )


def kernel_tables(data: Data) -> dict[str, Table]:
    """Table of every case and path by group of layers."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for name, found in data.items():
        if name.count(" | ") == 2 and not name.startswith(("tile", *WHOLE_MODEL)) and isinstance(found, dict):
            group, case, path = name.split(" | ")
            cell = with_share if case.startswith("decode") else lambda *key: microseconds(seconds(*key))
            groups.setdefault(group, {}).setdefault(case, {})[path] = cell(data, group, case, path) or "failed"
    tables = {}
    for group, cases in groups.items():
        paths = list(dict.fromkeys(path for row in cases.values() for path in row))
        rows = [[case, *(row.get(path, "") for path in paths)] for case, row in cases.items()]
        tables[group] = Table(head=["", *paths], rows=rows)
    return tables


def tile_lines(data: Data) -> str:
    """One line for each launch with all its tiles, the fastest first."""
    launches: dict[str, list[tuple[float, str]]] = {}
    bits: dict[str, set[int]] = {}
    for name, found in data.items():
        if name.startswith("tile | "):
            launch, tile = name.removeprefix("tile | ").rsplit(" | ", 1)
            taken, copy = found.get("seconds"), data.get("ceilings", {}).get("copy")
            share = f" ({found['bytes'] / taken / copy:.0%})" if taken and copy else ""
            entry = (float("inf"), f"{tile} failed") if taken is None else (taken, f"{tile} {taken * 1e6:.1f}{share}")
            launches.setdefault(launch, []).append(entry)
            bits.setdefault(launch, set()).update({found["bits"]} if "bits" in found else ())
    lines = [
        f"- {launch} ({len(bits[launch])} kinds of bits): " + "; ".join(text for _, text in sorted(found))
        for launch, found in launches.items()
    ]
    return "\n".join(["## Tiles", "", *lines]) if lines else ""
