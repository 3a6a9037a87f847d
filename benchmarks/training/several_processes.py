"""One model in several processes: what each holds, and whether all together learn and answer as one does.

    python -m benchmarks.training.several_processes

SmolLM2-135M-Instruct read matrix by matrix, float32 factors, gloo on one machine. Training: the same run of `t2 train`
in one process, in two with all factors in each, and with the factors divided by FSDP2 over two and four. Tensor
parallel: logits of a batch of eight requests with as many experts, and the gradient of z, over two and four processes
against one. Memory is anonymous, above that of a process that only imports; embeddings stay mapped from their file, and
it is measured in runs of its own, where MALLOC_MMAP_THRESHOLD_ lets glibc give freed tensors back to the system.
Processes share the cores, so seconds say what dividing costs, not what more machines bring. Takes about ten minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh

import t2
from benchmarks.common.memory import AnonymousPeak
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from benchmarks.training.step_speed import MODEL, TASK, TASK_OPTIONS
from t2.tasks import get
from t2.training import Trainer, TrainOptions
from t2.training.policies import svf_config
from t2.training.trainer import make_accelerator, sharding_mesh
from t2.weights.machine import machine

RUNS = [("all", 1), ("all", 2), ("shard", 2), ("shard", 4)] + [("tensor parallel", count) for count in (1, 2, 4)]
"""How the model is held, and processes; tensor parallel in one process is what the others are compared with."""
STEPS, PROMPTS, SAMPLES, TOKENS = 3, 8, 4, 16
CURVE = ("reward", "loss", "kl", "entropy", "gradient_norm", "validation")


def train(shard: bool, folder: Path, memory: AnonymousPeak) -> dict[str, Any]:
    """A run of a few steps; its curve, and the memory of this process."""
    options = TrainOptions(
        task=TASK,
        task_options=TASK_OPTIONS,
        output=folder / "run",
        steps=STEPS,
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        max_new_tokens=TOKENS,
        token_budget=1024,
        validation_size=16,
        test_size=0,
        shard=shard,
        trackers=(),
    )
    accelerator = make_accelerator(options)
    before = memory.now()
    mesh = sharding_mesh(accelerator) if shard else None
    svf, tokenizer = t2.load_factored(MODEL, svf_config(options, mesh))
    found: dict[str, Any] = {"loading": memory.peak - before, "loaded": memory.now() - before}
    quiet = Console(file=open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process
    task = get(TASK, **json.loads(TASK_OPTIONS))
    trainer = Trainer(svf, tokenizer, task, options, accelerator=accelerator, console=quiet)
    memory.peak, rows = 0, []
    for _ in range(STEPS):
        rows.append(trainer.step())
    return found | {"training": memory.peak - before, "rows": rows}


def answer(folder: Path, memory: AnonymousPeak) -> dict[str, Any]:
    """Logits of a mixed batch and a gradient of z, compared with those of one process."""
    processes = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (processes,)) if processes > 1 else None
    before = memory.now()
    svf, tokenizer = t2.load_factored(MODEL, t2.SVFConfig(tensor_parallel=mesh, progress=False))
    found: dict[str, Any] = {"loading": memory.peak - before, "loaded": memory.now() - before}
    names = [f"e{seed}" for seed in range(8)]
    for seed, name in enumerate(names):
        svf.add_expert(name, t2.Expert.random(svf.layout, 0.05, seed))
    text = [f"What is {17 * i} plus {29 * i + 3}?" for i in range(8)]
    inputs = tokenizer(text, return_tensors="pt", padding=True)
    read = inputs["attention_mask"].bool()
    start = time.perf_counter()
    with torch.no_grad():
        logits = svf(**inputs, experts=names).logits[read]
    found["forward_seconds"] = time.perf_counter() - start
    z = svf.bank["e0"].z.clone().requires_grad_()
    start = time.perf_counter()
    with svf.route(z):
        svf(**inputs).logits[read].log_softmax(-1)[..., 0].mean().backward()
    found["backward_seconds"] = time.perf_counter() - start
    assert z.grad is not None
    here, reference = {"logits": logits.contiguous(), "z": z.grad}, folder.parent / "alone.safetensors"
    if processes == 1:
        save_file(here, reference)
    expected = load_file(reference)
    for name, tensor in here.items():
        found[name] = float((tensor - expected[name]).abs().max() / expected[name].abs().max())
    return found | {"training": memory.peak - before}


def run(mode: str, folder: Path) -> None:
    """One process of a run; its figures are written to the folder."""
    memory = AnonymousPeak(interval=0.01)
    memory.start()
    found = answer(folder, memory) if mode == "tensor parallel" else train(mode == "shard", folder, memory)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(mode: str, processes: int, folder: Path, **settings: str) -> list[dict[str, Any]]:
    """The figures of each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.training.several_processes", "--work", mode, "--folder", str(folder)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    settings["OMP_NUM_THREADS"] = str(threads)
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | settings)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def processes_table(results: Any) -> Table:
    """What each process holds, and the largest difference from one process."""
    runs = results["runs"]
    alone = next(run for run in runs if run["mode"] == "all" and len(run["found"]) == 1)["found"][0]["rows"]
    lines = []
    for run in runs:
        found = run["found"]
        training = run["mode"] != "tensor parallel"
        if training:
            different = max(
                abs(row[name] - other[name]) / max(abs(other[name]), 1e-3)
                for row, other in zip(found[0]["rows"], alone, strict=True)
                for name in CURVE
                if other.get(name) is not None
            )
            seconds = min(row["seconds"] for row in found[0]["rows"])
        else:
            different = max(max(each["logits"], each["z"]) for each in found)
            seconds = found[0]["forward_seconds"] + found[0]["backward_seconds"]
        name = {"all": "training, all factors in each", "shard": "training, `--shard` (FSDP2)"}.get(
            run["mode"], "answers and gradients, tensor parallel"
        )
        phases = ("loading", "loaded", "training")
        largest = [f"{max(each[phase] for each in run['memory']) / 1e6:,.0f}" for phase in phases]
        compared = "" if len(found) == 1 else f"{different:.1e}"
        lines.append([name, str(len(found)), *largest, compared, f"{seconds:.1f}"])
    about = results["machine"]
    return Table(
        f"SmolLM2-135M-Instruct, float32 factors, {about['threads']} cores of {about['processor']} for all processes "
        "together (`python -m benchmarks.training.several_processes`); MB of anonymous memory in the largest process. "
        f"Differences are relative: of {STEPS} steps' rewards, losses, KL, entropies and gradient norms, and of "
        "the largest logit and gradient:",
        ["", "processes", "loading", "loaded", "running", "largest difference from one process", "s"],
        lines,
        "Seconds are those of a training step, or of a forward and a backward pass.",
    )


def main(work: str | None = None, folder: Path | None = None, results: Path = RESULTS / "processes.json") -> None:
    """Args:
    work: Be one process of this run; torchrun starts it.
    folder: For the figures of processes.
    results: File for the results as JSON.
    """
    if work is not None:
        assert folder is not None
        run(work, folder)
        return
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for number, (mode, processes) in enumerate(RUNS):
            folders = [Path(place) / f"{number} {measured}" for measured in ("time", "memory")]
            found = []
            for own, settings in zip(folders, ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}), strict=True):
                own.mkdir()
                found.append(launch(mode, processes, own, **settings))
            runs.append({"mode": mode, "found": found[0], "memory": found[1]})
    content = {"machine": machine(), "runs": runs}
    write_results(results, content)
    processes_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
