"""Generated blocks of README.md, CONTRIBUTING.md and docs/, from the JSON files in benchmarks/results/.

python -m benchmarks.render            # rewrites the blocks between <!-- name --> and <!-- end -->
python -m benchmarks.render --check    # exits 1 with a diff if a block is not what the results say
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable

import tyro

from benchmarks import compatibility
from benchmarks.adaptation import eval_tables, few_shot_margin, few_shot_speed, growing_bank, transfer
from benchmarks.common.tables import ROOT, Table, read_results
from benchmarks.gpu import report as gpu
from benchmarks.journey import run as journey
from benchmarks.kernels import moe
from benchmarks.kernels import report as kernels
from benchmarks.serving import (
    decode_loops,
    delta_form,
    engine_peers,
    factor_tail,
    fidelity,
    http_load,
    memory,
    peft_batches,
    plans,
    quantized_bases,
    ray_replicas,
    throughput,
    vllm_experts,
)
from benchmarks.tasks import humaneval, sandbox
from benchmarks.training import big_model, several_processes, step_speed, train_experts, trl_grpo

Block = tuple[Callable[..., Table], *tuple[str, ...]]
"""Function that builds a table, and the result files it takes."""

H200 = "gpu-h200.json"
PAGES: dict[str, dict[str, Block]] = {
    "README.md": {"headline": (throughput.headline, "cpu-serving.json")},
    "docs/adaptation.md": {
        "growing-bank": (growing_bank.growing_table, "growing-bank.json"),
        "fewshot-speed": (few_shot_speed.speed_table, "fewshot-speed.json"),
        "margin": (few_shot_margin.margin_table, "margin.json"),
        "eval": (eval_tables.eval_text, "eval.json"),
    },
    "docs/benchmarks.md": {
        "serving": (throughput.throughput_table, "cpu-serving.json"),
        "demo": (throughput.demo_table, "demo.json"),
        "linear": (kernels.linear_table, "cpu-linear.json"),
        "fidelity": (fidelity.fidelity_table, "fidelity.json"),
        "memory": (memory.memory_table, "memory.json"),
        "delta": (delta_form.delta_table, "delta-form.json"),
    },
    "docs/big-models.md": {
        "big-plans": (big_model.plans_table, *big_model.PLANNED.values()),
        "big-model": (big_model.memory_table, "big-model-llama-3-8b.json"),
        "big-mixture": (big_model.memory_table, "big-model-qwen3-30b-a3b.json"),
    },
    "docs/cpu.md": {
        "factor-tail": (factor_tail.tail_table, "factor-tail.json"),
        "claims": (kernels.ratios_table, "cpu-linear.json"),
        "claims-avx2": (kernels.ratios_table, "cpu-linear-avx2.json"),
        "experts": (kernels.experts_table, "cpu-experts.json"),
        "shapes": (kernels.shapes_table, "cpu-linear.json"),
        "backward": (kernels.backward_table, "cpu-linear.json"),
        "attention": (kernels.attention_table, "cpu-attention.json"),
        "delta": (kernels.delta_table, "cpu-delta.json"),
        "plans": (plans.plans_text, "cpu-plan.json"),
    },
    "docs/gpu.md": {
        "gpu-machine": (gpu.machine_text, H200),
        "gpu-decode": (gpu.decode_table, H200),
        "gpu-prefill": (gpu.prefill_table, H200),
        "gpu-experts": (gpu.experts_table, H200),
        "gpu-end-to-end": (gpu.end_to_end_table, H200),
        "gpu-predictions": (gpu.predictions_table, H200),
    },
    "docs/models.md": {
        "cpu-moe": (moe.moe_table, "cpu-moe.json"),
        "quantized-bases": (quantized_bases.bases_table, "quantized-bases.json"),
        "families": (compatibility.families_table, "families.json"),
    },
    "docs/quickstart.md": {"journey": (journey.journey_table, "journey.json")},
    "docs/peft.md": {"peft-batches": (peft_batches.batches_table, "peft-batches.json")},
    "docs/serving.md": {
        "decode-loops": (decode_loops.loops_table, "decode-loops.json"),
        "engine-peers": (engine_peers.peers_table, "engine-peers.json"),
        "http-load": (http_load.load_table, "http-load.json"),
        "ray-replicas": (ray_replicas.replicas_table, "ray-replicas.json"),
    },
    "docs/vllm.md": {
        "vllm-answers": (vllm_experts.answers_table, "vllm-experts.json"),
        "vllm-speed": (vllm_experts.speed_table, "vllm-experts.json"),
    },
    "docs/tasks.md": {
        "sandbox": (sandbox.attacks_table, "sandbox.json"),
        "humaneval": (humaneval.pass_table, "humaneval.json"),
    },
    "docs/training.md": {
        "processes": (several_processes.processes_table, "processes.json"),
        "trl-grpo": (trl_grpo.trainers_table, "trl-grpo.json"),
        "experts-trained": (train_experts.trained_table, "training.json"),
        "training-speed": (step_speed.speed_table, "training-speed.json"),
        "experts-compared": (train_experts.comparison_table, "training.json"),
        "experts-rates": (train_experts.rates_table, "training.json"),
    },
    "docs/transfer.md": {"transfer": (transfer.transfer_table, "transfer.json")},
    "CONTRIBUTING.md": {"versions": (compatibility.versions_table, "versions.json")},
}


def rendered(page: str, text: str) -> str:
    """Text of a page with all its blocks as the results say; ValueError if one has no markers."""
    for name, (build, *files) in PAGES[page].items():
        block = build(*map(read_results, files)).markdown()
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
        if not found:
            raise ValueError(f"{page}: expected a block <!-- {name} --> ... <!-- end -->, got none")
    return text


def main(check: bool = False) -> None:
    """Args:
    check: Compare only; exit with 1 and a diff if a block is not current.
    """
    stale = False
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = rendered(page, old)
        if check:
            diff = difflib.unified_diff(old.splitlines(True), new.splitlines(True), page, f"{page} by the results", n=0)
            changed = list(diff)
            sys.stderr.writelines(changed)
            stale |= bool(changed)
        elif new != old:
            path.write_text(new)
    if stale:
        sys.exit("blocks differ from benchmarks/results/; run python -m benchmarks.render")


if __name__ == "__main__":
    tyro.cli(main)
