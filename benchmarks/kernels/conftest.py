"""Result files of pytest-benchmark, reduced to the measurements of every round."""

from __future__ import annotations

from typing import Any

from t2.weights.machine import machine


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keeps every round of every path, and the machine's limits in that round."""
    output_json.pop("commit_info", None)
    output_json["benchmarks"] = [
        {"test": benchmark["name"].partition("[")[0], **benchmark["extra_info"]}
        for benchmark in output_json["benchmarks"]
    ]
