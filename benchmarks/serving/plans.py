"""Layer forms that the planner chooses for SmolLM2, with predicted and measured times.

    python -m benchmarks.serving.plans

Writes benchmarks/results/cpu-plan.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from transformers.utils import logging

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from t2.weights.machine import machine

WORK: dict[str, dict[str, Any]] = {
    "32 requests with 32 experts": {"experts": 32, "prompt_tokens": 40, "new_tokens": 64},
    "the same, weights within 1%": {"experts": 32, "prompt_tokens": 40, "new_tokens": 64, "max_weight_error": 0.01},
    "the same, weights within 5%": {"experts": 32, "prompt_tokens": 40, "new_tokens": 64, "max_weight_error": 0.05},
    "one expert, 32 requests, 64 tokens each": {"experts": 1, "prompt_tokens": 40, "new_tokens": 64},
    "one expert, 32 requests, 1024 tokens each": {"experts": 1, "prompt_tokens": 512, "new_tokens": 1024},
}


def plans_text(results: Any) -> Table:
    """Explanation of every plan."""
    return Table("\n\n".join(f"{label}:\n\n```\n{text}\n```" for label, text in results["explained"].items()))


def main(results: Path = RESULTS / "cpu-plan.json") -> None:
    """Args:
    results: File for the results as JSON.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    svf = t2.SVFModel(t2.load("smollm2-135m-instruct")[0], t2.SVFConfig(dtype=torch.float16, progress=False))
    names = [f"e{i}" for i in range(32)]
    for i, name in enumerate(names):
        svf.add_expert(name, t2.Expert.random(svf.layout, std=0.05, seed=i))
    explained = {}
    for label, work in WORK.items():
        options = dict(work)
        experts = names[: options.pop("experts")]
        plan = svf.plan(experts if len(experts) > 1 else experts[0], batch=32, **options)
        svf.measure_plan(plan)
        explained[label] = plan.explain()
    found = {"machine": machine(), "explained": explained}
    write_results(results, found)
    plans_text(found).show()


if __name__ == "__main__":
    tyro.cli(main)
