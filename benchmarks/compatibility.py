"""Tables of the versions and model families that the tests ran with (`make test-versions`, `make test-families`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.tables import Table


def versions_table(results: Any) -> Table:
    """Outcome of the kernels' tests by version of Python, each with one wheel, and torch."""

    def ordered(key: str) -> list[str]:
        return sorted({row[key] for row in results}, key=lambda name: [int(part) for part in name.split(".")])

    cells = {
        (row["python"], row["torch"]): row["tests"].partition(",")[0]
        if row["result"] == "passed"
        else row["result"][:80].replace("|", "/")
        for row in results
    }
    torches = ordered("torch")
    return Table(
        head=["", *(f"torch {torch}" for torch in torches)],
        rows=[
            [f"Python {python}", *(cells.get((python, torch), "") for torch in torches)] for python in ordered("python")
        ],
    )


def families_table(results: Any) -> Table:
    """Verdict on every family of transformers that could be built in a tiny size."""
    families = results["families"]
    built = sorted((each for each in families if each["built"] == "ok"), key=lambda each: each["family"])
    missing = ", ".join(f"`{each['family']}`" for each in families if each["built"] != "ok")
    wrapped = [each for each in built if each["wrapped"] == "ok"]
    whole = sum(each["share"] >= 0.9 for each in wrapped)
    batches = sum(bool(each["engine"]) for each in wrapped)
    return Table(
        f"With transformers {results['transformers']}, {len(built)} of {len(families)} families could be built: "
        f"{whole} are decomposed whole (at least 90% of their blocks' weights), {len(wrapped) - whole} in part, "
        f"{len(built) - len(wrapped)} are refused; {sum(map(is_wrong, built))} answer wrongly. The engine runs "
        f"{len(wrapped) - batches} token by token and {batches} in whole batches. The shares of a tiny "
        "model's parts are not those of a large one.",
        ["family", "verdict", "decomposed", "notes"],
        [[f"`{each['family']}`", verdict(each), f"{each['share']:.0%}", notes(each)] for each in built],
        f"Not built tiny: {missing}.",
    )


def is_wrong(found: Mapping[str, Any]) -> bool:
    return any(outcome.startswith("wrong") for outcome in found["checks"].values())


def verdict(found: Mapping[str, Any]) -> str:
    if is_wrong(found):
        return "**wrong**"
    if found["wrapped"] != "ok":
        return "refused"
    return "whole" if found["share"] >= 0.9 else "in part"


def notes(found: Mapping[str, Any]) -> str:
    """Cause of a refusal or the largest weights left dense, then the checks that are not ok."""
    lines = []
    if found["wrapped"] != "ok":
        lines.append(found["wrapped"].partition("wrapped: ")[2].partition(". It is as it was")[0])
    elif found["share"] < 0.9:
        total = sum(found["dense"].values()) / (1 - found["share"])
        largest = sorted(found["dense"].items(), key=lambda item: (-item[1], item[0]))[:2]
        lines.append("dense: " + ", ".join(f"`{name}` {size / total:.0%}" for name, size in largest))
    lines += [f"{name}: {outcome}" for name, outcome in found["checks"].items() if outcome != "ok"]
    return "; ".join(line[:160].replace("|", "/") for line in lines)
