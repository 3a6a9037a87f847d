from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import t2
from t2.training import Trainer, TrainOptions, TrainResult
from t2.training.trainer import train
from t2.weights.files import FileFormatError, read_safetensors
from tests.t2.processes.launch import ROOT, environment
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer

TIMES = ("seconds", "rollout_seconds")


def run(options: TrainOptions, **kwargs: Any) -> TrainResult:
    return Trainer(toy_model(), toy_tokenizer(), kwargs.pop("task", SayTheWord()), options, **kwargs).run()


def curve(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / "checkpoint.safetensors")[0]


def assert_same_curve(found: Path, expected: Path) -> None:
    """Up to the order in which processes add their gradients."""
    for row, other in zip(curve(found), curve(expected), strict=True):
        assert [name for name in row if row[name] is None] == [name for name in other if other[name] is None]
        numbers = [{name: value for name, value in each.items() if value is not None} for each in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5)


def start(options: TrainOptions, *launcher: str) -> subprocess.Popen[str]:
    given = options.to_dict() | {"output": str(options.output), "resume": options.resume}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.t2.training.run_toy", json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def test_reinforce_teaches_the_toy_task(make_options):
    options = make_options(steps=30, validate_every=5, prompts_per_step=8, samples_per_prompt=8, kl_coefficient=0.01)
    result = run(options)
    assert result.finished and result.base is not None and result.best is not None
    assert result.base.accuracy <= 0.5 and result.best.accuracy >= result.base.accuracy + 0.4
    rows = curve(options.output)
    assert [row["step"] for row in rows] == list(range(31))
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.5
    assert (options.output / "curve.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((options.output / "result.json").read_text())
    assert figures["best"]["accuracy"] == result.best.accuracy and figures["trainable"] == 384


def test_the_result_is_the_best_checkpoint_and_serves(make_options):
    options = make_options(steps=8)
    result = run(options)
    best = t2.Expert.load(result.expert)
    rows = [row for row in curve(options.output) if "validation" in row]
    top = max(row["validation"] for row in rows)
    assert result.state.best_score == top
    assert result.state.best_step == next(row["step"] for row in rows if row["validation"] == top)
    assert torch.equal(best.z, parameters(options.output)["best.0"])
    last = t2.Expert.load(options.output / "last.safetensors")
    assert torch.equal(last.z, parameters(options.output)["parameters.0"])
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    svf.add_expert("say", best)


@pytest.mark.parametrize("method", ["lora", "dense-compose"])
def test_other_methods_learn_under_the_same_loop(make_options, method: str):
    rate = 5e-2 if method == "dense-compose" else 2e-2
    options = make_options(method=method, steps=20, prompts_per_step=8, samples_per_prompt=8, learning_rate=rate)
    result = run(options)
    assert result.best is not None and result.best.accuracy >= result.base.accuracy + 0.2
    assert result.expert.exists()


def test_the_next_token_objective_learns(make_options):
    options = make_options(objective="next-token", steps=20, learning_rate=5e-2)
    result = run(options)
    rows = curve(options.output)
    assert rows[-1]["loss"] < 0.7 * rows[1]["loss"]
    assert result.best is not None and result.best.accuracy > result.base.accuracy


def test_next_token_needs_solutions(make_options):
    with pytest.raises(ValueError, match=r"the likelihood of solutions expects a task that has some, got say"):
        run(make_options(objective="next-token"), task=SayTheWord(solutions=False))


def test_token_budget_and_checkpointing_leave_the_update_as_it_is(make_options, tmp_path):
    runs = {
        "whole": make_options(steps=1, output=tmp_path / "whole"),
        "small": make_options(steps=1, output=tmp_path / "small", token_budget=24),
        "again": make_options(steps=1, output=tmp_path / "again", gradient_checkpointing=True),
    }
    for options in runs.values():
        run(options)
    whole = parameters(tmp_path / "whole")["optimizer.0.exp_avg"]
    assert whole.norm() > 0
    for name in ("small", "again"):
        assert (parameters(tmp_path / name)["optimizer.0.exp_avg"] - whole).norm() < 1e-4 * whole.norm()


def test_a_resumed_run_goes_on_with_the_same_curve(make_options, tmp_path):
    whole = make_options(steps=6, output=tmp_path / "whole")
    run(whole)
    part = make_options(steps=3, output=tmp_path / "part")
    run(part)
    run(replace(part, steps=6, resume=True))
    expected = [row for row in curve(whole.output)]
    found = [row | ({"validation": None} if row["step"] == 3 else {}) for row in curve(part.output)]
    assert [row["gradient_norm"] for row in found[1:]] == [row["gradient_norm"] for row in expected[1:]]
    assert torch.equal(parameters(part.output)["parameters.0"], parameters(whole.output)["parameters.0"])


def test_a_killed_run_goes_on_with_the_same_curve(make_options, tmp_path):
    whole = make_options(steps=16, output=tmp_path / "whole", learning_rate=1e-2)
    run(whole)
    killed = replace(whole, output=tmp_path / "killed")
    process = start(killed)
    metrics = killed.output / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(curve(killed.output)) < 17
    run(replace(killed, resume=True))
    assert curve(killed.output) == curve(whole.output)
    assert torch.equal(parameters(killed.output)["parameters.0"], parameters(whole.output)["parameters.0"])


def test_sigint_saves_and_ends_well(make_options, tmp_path):
    options = make_options(steps=5000, output=tmp_path / "run", validate_every=1000)
    process = start(options)
    metrics = options.output / "metrics.jsonl"
    while process.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    state = json.loads(read_safetensors(options.output / "checkpoint.safetensors")[1]["state"])
    assert f"stopped {state['step']}" in out
    assert len(curve(options.output)) == state["step"] + 1
    assert (options.output / "last.safetensors").is_file() and (options.output / "best.safetensors").is_file()


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {}),
        (2, {"shard": True}),
        (2, {"shard": True, "gradient_checkpointing": True}),
        (4, {"shard": True, "cold_start_steps": 1}),  # one of them has two prompts of the five
    ],
)
def test_several_processes_train_as_one_does(make_options, tmp_path, processes, changes):
    alone = make_options(
        **{"steps": 3, "output": tmp_path / "alone", "prompts_per_step": 5, "learning_rate": 2e-3}
        | {name: value for name, value in changes.items() if name != "shard"}
    )
    run(alone)
    several = replace(alone, output=tmp_path / "several", **changes)
    process = start(several, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert_same_curve(several.output, alone.output)
    found, expected = (parameters(o.output)["parameters.0"] for o in (several, alone))
    assert (found - expected).abs().max() < 0.02 * (expected - 1).abs().max()


def test_a_sharded_run_needs_several_processes_and_can_go_on_in_one(make_options, tmp_path):
    options = make_options(steps=2, output=tmp_path / "run", shard=True)
    with pytest.raises(ValueError, match="shard: expected two processes or more"):
        run(options)
    process = start(options, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    whole = replace(options, output=tmp_path / "whole", shard=False, steps=4)
    run(whole)
    run(replace(options, shard=False, resume=True, steps=4))
    assert_same_curve(options.output, whole.output)


@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "dense-compose"}, {"support": 4}])
def test_only_the_factored_form_is_sharded(make_options, changes):
    with pytest.raises(ValueError, match="shard: expected no unless the method is svf, without a support"):
        make_options(shard=True, **changes)


def test_the_rate_warms_up_and_decays(make_options):
    for changes, expected in (
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"decay": True, "steps": 4}, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ):
        options = make_options(**{"steps": 5, "learning_rate": 2e-3, "validate_every": 5} | changes)
        run(options)
        rates = [row["learning_rate"] / 2e-3 for row in curve(options.output)[1:]]
        assert rates == pytest.approx(expected)
        shutil.rmtree(options.output)


def test_an_alarm_lowers_the_rate_and_goes_back(make_options, capsys):
    options = make_options(steps=12, learning_rate=0.5, kl_alarm=0.05, kl_coefficient=0.01)
    result = run(options)
    assert result.state.rate_scale < 1
    rates = [row["learning_rate"] for row in curve(options.output)[1:]]
    assert rates[0] == 0.5 and sorted(rates, reverse=True) == rates
    assert rates[-1] in (0.5 * result.state.rate_scale, result.state.rate_scale)
    assert "half the learning rate" in capsys.readouterr().out


def test_solutions_come_before_rewards_in_a_cold_start(make_options):
    rates_of = {"cold_start_learning_rate": 0.04, "learning_rate": 0.01}
    options = make_options(steps=8, cold_start_steps=5, **rates_of)
    run(options)
    rows = curve(options.output)[1:]
    assert ["reward" in row for row in rows] == [False] * 5 + [True] * 3
    rates = [row["learning_rate"] for row in rows]
    assert rates[0] == 0.04 and rates[:5] == sorted(rates[:5], reverse=True) and rates[5] == 0.01


def test_solutions_raise_no_alarm(make_options):
    options = make_options(steps=5, cold_start_steps=5, validate_every=1, kl_alarm=1e-9, on_alarm="stop")
    assert run(options).state.step == 5
    assert curve(options.output)[-1]["kl"] > 1e-3


def test_a_cold_start_resumes_to_the_same_curve(make_options):
    whole = make_options(steps=6, cold_start_steps=3)
    run(whole)
    parts = replace(whole, output=whole.output.with_name("parts"))
    run(replace(parts, steps=4))
    run(replace(parts, resume=True))
    assert curve(parts.output) == curve(whole.output)


def test_an_alarm_can_end_the_run(make_options):
    options = make_options(steps=12, learning_rate=0.5, kl_alarm=0.05, on_alarm="stop")
    assert run(options).state.step < 12


def test_a_run_without_a_better_validation_ends_when_its_patience_does(make_options):
    options = make_options(steps=20, learning_rate=1e-9, patience=2, validate_every=2)
    result = run(options)
    assert result.finished and result.state.step == 4 and result.state.best_step == 0 and result.best is not None
    again = run(replace(options, resume=True))
    assert again.finished and again.state.step == 4
    further = run(replace(options, resume=True, patience=3))
    assert further.finished and further.state.step == 6
    cold = run(make_options(output=options.output / "cold", steps=20, learning_rate=1e-9, patience=2,
                            cold_start_steps=5, cold_start_learning_rate=1e-9))  # fmt: skip
    assert cold.finished and cold.state.step == 9


def test_a_run_that_can_not_do_better_ends_where_it_may(make_options):
    options = make_options(steps=60, objective="next-token", learning_rate=5e-2, validate_every=2, patience=20)
    result = run(options)
    assert result.finished and result.state.best_score == 1.0 and result.state.step == result.state.best_step < 60


def test_a_run_writes_its_options_beside_it(make_options):
    options = make_options(steps=2)
    run(options)
    assert json.loads((options.output / "options.json").read_text()) == options.to_dict()


@pytest.mark.parametrize("terminal", [False, True])
def test_every_step_is_a_line_that_fits(make_options, terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80)
    run(make_options(steps=4, validate_every=2), console=console)
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", text.getvalue()).splitlines() if line.strip()]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {i}/4" for i in (1, 2, 3, 4)]
    assert ["validation" in line for line in steps] == [False, True, False, True]
    assert max(map(len, lines)) <= 80 and any(line.startswith("base: validation") for line in lines)


def test_what_is_wrong_is_said_before_the_model_is_loaded(make_options, tmp_path, monkeypatch):
    monkeypatch.setattr("t2.weights.loading.load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "checkpoint.safetensors").write_bytes(b"")
    task = {"task": "reasoning-gym:chain_sum"}
    with pytest.raises(ValueError, match="expected a folder without a run"):
        train("no-model", make_options(**task, output=folder))
    with pytest.raises(FileNotFoundError, match="expected a run to resume"):
        train("no-model", make_options(**task, resume=True))
    assert list(tmp_path.iterdir()) == [folder] and len(list(folder.iterdir())) == 1


def test_a_folder_with_a_run_is_left_alone(make_options):
    options = make_options(steps=1)
    run(options)
    before = (options.output / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"output: expected a folder without a run, got .*--resume"):
        run(options)
    with pytest.raises(ValueError, match=r"options that the run was started with \(seed 0\)"):
        run(replace(options, resume=True, seed=1))
    assert (options.output / "metrics.jsonl").read_bytes() == before


def test_resume_needs_a_whole_checkpoint(make_options):
    options = make_options(resume=True)
    with pytest.raises(FileNotFoundError, match="found no checkpoint"):
        run(options)
    options.output.mkdir()
    (options.output / "checkpoint.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FileFormatError, match="truncated or corrupt"):
        run(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number > 0, got 0.0"),
        ({"samples_per_prompt": 1}, "samples_per_prompt: expected at least 2 for the leave-one-out baseline, got 1"),
        ({"task_options": "[1]"}, r"task_options: expected a JSON object, got '\[1\]'"),
        ({"task_options": "{"}, "task_options: expected a JSON object, got '{'"),
        ({"kl_coefficient": -0.1}, "kl_coefficient: expected a number >= 0, got -0.1"),
    ],
)
def test_options_refuse(make_options, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_options(**changes)


def test_training_can_begin_with_an_expert(make_options, tmp_path):
    taught = run(make_options(objective="next-token", steps=20, output=tmp_path / "taught"))
    options = make_options(steps=2, start=taught.expert, output=tmp_path / "on", learning_rate=1e-3)
    run(options)
    first = curve(options.output)[0]
    assert first["validation"] == taught.state.best_score > first["base"] == taught.state.base_score
    assert curve(options.output)[1]["kl"] > 0.01
    with pytest.raises(ValueError, match="start: expected none unless z itself is trained, got"):
        make_options(start=taught.expert, method="lora")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(make_options(start=tmp_path / "nowhere.safetensors", output=tmp_path / "none"))


@pytest.mark.parametrize("method", ["svf", "lora", "dense-compose"])
def test_a_step_without_a_right_answer_changes_nothing(make_options, method: str):
    class Unsolvable(SayTheWord):
        def scores(self, problems, answers):
            return [0.0] * len(answers)

    options = make_options(method=method)
    trainer = Trainer(toy_model(), toy_tokenizer(), Unsolvable(), options)
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters]
    assert trainer.step()["gradient_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.parameters, before, strict=True))


def test_every_problem_comes_once_before_any_comes_again(make_options):
    trainer = Trainer(toy_model(), toy_tokenizer(), SayTheWord(), make_options(prompts_per_step=5))
    seen = []
    for trainer.state.step in range(8):
        seen += trainer._indices()
    assert all(sorted(seen[i : i + 8]) == list(range(8)) for i in range(0, 40, 8))
    assert seen[:8] != seen[8:16]


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    toy_model().to(torch.bfloat16).save_pretrained(folder, max_shard_size="12KB")
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"factor_dtype": "int8", "model_dtype": "bfloat16"}])
def test_a_streamed_model_trains_as_one_loaded_whole(make_options, tmp_path, sharded, monkeypatch, changes):
    monkeypatch.setattr("t2.tasks.get", lambda name, **options: SayTheWord())
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    runs = [make_options(steps=2, stream=stream, output=tmp_path / stream, **changes) for stream in ("auto", "no")]
    for options in runs:
        assert train(str(sharded), options).finished
    (streamed, whole) = (parameters(options.output)["parameters.0"] for options in runs)
    assert torch.equal(streamed, whole) and (whole - 1).abs().max() > 1e-3
    assert curve(runs[0].output) == curve(runs[1].output)
    assert train(str(sharded), replace(runs[1], steps=3, resume=True, stream="yes")).state.step == 3
    with pytest.raises(ValueError, match=r"resume: expected the options .*model_dtype"):
        train(str(sharded), replace(runs[0], steps=3, resume=True, model_dtype="float16"))


def test_runs_saved_before_an_option_was_there_had_its_default(make_options):
    saved = make_options().to_dict()
    del saved["model_dtype"], saved["stream"]
    assert make_options().differences(saved) == []
    assert make_options(model_dtype="bfloat16").differences(saved) == ["model_dtype"]


def test_runs_saved_with_the_option_names_of_version_0_1_resume(make_options):
    old = {"factor_dtype": "dtype", "skip_zero_advantage": "skip_even_prompts"}
    saved = {old.get(name, name): value for name, value in make_options().to_dict().items()}
    assert {"dtype", "skip_even_prompts"} <= set(saved) and make_options().differences(saved) == []
    assert make_options(skip_zero_advantage=False).differences(saved) == ["skip_zero_advantage"]


def test_only_svf_streams(make_options):
    with pytest.raises(ValueError, match="stream: expected auto or no unless the method is svf, got 'yes'"):
        make_options(stream="yes", method="lora")
