from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from t2.weights.files import read_safetensors
from tests.t2.training.test_trainer import curve

pytestmark = pytest.mark.slow
STEPS, COLD = 10, 3
SUMS = {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}


def start(output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = "train smollm2-135m-instruct --task reasoning-gym:chain_sum --max-new-tokens 6 --prompts-per-step 4"
    command += f" --samples-per-prompt 4 --steps {STEPS} --cold-start-steps {COLD} --validate-every 5"
    command += " --validation-size 16 --test-size 16 --factor-dtype bfloat16 --bf16-products"
    command += " --kl-coefficient 0.01 --trackers"
    arguments = [*command.split(), "--task-options", json.dumps(SUMS), "--output", str(output), *more]
    return subprocess.Popen([sys.executable, "-m", "t2", *arguments], stdout=subprocess.DEVNULL)


def test_a_run_that_is_killed_at_a_random_step_goes_on_with_the_same_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    step = random.randint(1, STEPS - 1)
    print(f"killed after step {step}")
    process = start(killed)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > step):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert step <= curve(killed)[-1]["step"] < STEPS
    assert start(killed, "--resume").wait() == 0
    assert [row["step"] for row in curve(whole)] == list(range(STEPS + 1))
    assert curve(killed) == curve(whole)
    states = [read_safetensors(folder / "checkpoint.safetensors")[0] for folder in (whole, killed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    results = [json.loads((folder / "result.json").read_text())["best"] for folder in (whole, killed)]
    assert results[0] == results[1]
