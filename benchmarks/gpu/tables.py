"""The figures of a run as tables."""

from __future__ import annotations

from typing import Any

WHOLE = ("end to end", "peft", "rl step", "generate")  # of whole models


def report(data: dict[str, Any]) -> str:
    """All figures of `results.json` as Markdown: microseconds, and shares of the measured copy bandwidth."""
    machine = data.get("environment", {})
    lines = [f"# {machine.get('device', 'CPU')}", ""]
    lines.append(f"torch {machine.get('torch')}, Triton {machine.get('triton')}.")
    limits = data.get("ceilings", {})
    if "copy" in limits:
        lines += [
            "",
            f"Copy {limits['copy'] / 1e12:.2f} TB/s, sum {limits['sum'] / 1e12:.2f} TB/s; bfloat16 "
            f"{limits['bfloat16'] / 1e12:.0f} TFLOP/s.",
        ]
    stages = {name.split(" | ")[1]: found for name, found in data.items() if name.startswith("stage | ")}
    lines += ["", *(f"- {name}: {found['ended']}, {found['took']} s" for name, found in stages.items())]
    wrong = [name for name, found in data.items() if name.startswith("correct | ") and not found.get("right")]
    checks = sum(name.startswith("correct | ") for name in data)
    lines += ["", f"{checks - len(wrong)} of {checks} checks against float64 right. {'; '.join(wrong)}"]
    if "tests" in data:
        lines += ["", f"tests: {data['tests']}"]
    lines += _kernels(data, limits) + _tiles(data, limits)
    others = {n: f for n, f in data.items() if n.startswith(WHOLE)}
    if others:
        lines += ["", "## End to end", ""]
        lines += [f"- {name}: {_short(found)}" for name, found in others.items()]
    return "\n".join(lines) + "\n"


def _short(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    if "error" in found:
        return f"failed: {found['error'][:200]}"
    return ", ".join(
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )


def _kernels(data: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    groups: dict[str, dict[str, dict[str, str]]] = {}
    for name, found in data.items():
        if name.count(" | ") == 2 and not name.startswith(("tile", *WHOLE)) and isinstance(found, dict):
            group, case, path = name.split(" | ")
            cell = f"{found['seconds'] * 1e6:.1f}" if "seconds" in found else "failed"
            size = data.get(f"bytes | {group}", {})
            if case.startswith("decode") and "seconds" in found and "copy" in limits and "bfloat16" in size:
                read = size["dense"] if "dense" in path or "LoRA" in path else size["bfloat16"]
                if "int8" in path or "float8" in path:
                    read = read / 2 * (1 + 1 / 32)
                cell += f" ({read / found['seconds'] / limits['copy']:.0%})"
            groups.setdefault(group, {}).setdefault(case, {})[path] = cell
    lines = []
    for group, rows in groups.items():
        paths = list(dict.fromkeys(path for row in rows.values() for path in row))
        lines += ["", f"## {group}", "", f"| | {' | '.join(paths)} |", f"| --- |{' ---: |' * len(paths)}"]
        lines += [f"| {case} | {' | '.join(row.get(path, '') for path in paths)} |" for case, row in rows.items()]
    return lines


def _tiles(data: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    launches: dict[str, list[tuple[float, str]]] = {}
    for name, found in data.items():
        if name.startswith("tile | "):
            head, tile = name.removeprefix("tile | ").rsplit(" | ", 1)
            seconds = found.get("seconds")
            if seconds is None:
                launches.setdefault(head, []).append((float("inf"), f"{tile} failed"))
            else:
                share = found["bytes"] / seconds / limits["copy"] if "copy" in limits else 0.0
                launches.setdefault(head, []).append((seconds, f"{tile} {seconds * 1e6:.1f} ({share:.0%})"))
    lines = ["", "## Tiles", ""] if launches else []
    for head, found in launches.items():
        bits = {f.get("bits") for n, f in data.items() if n.startswith(f"tile | {head} | ") and "bits" in f}
        lines.append(f"- {head} ({len(bits)} kinds of bits): " + "; ".join(text for _, text in sorted(found)))
    return lines
