"""Checkpoints that were edited or damaged, and runs that are resumed on another base than they were started on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.experts.expert import Expert
from t2.training import Trainer, TrainOptions
from t2.training.checkpoint import Base, Checkpoint, State, optimizer_tensors
from t2.training.metrics import Metrics
from t2.weights.files import FileFormatError, read_safetensors, write_safetensors
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer

DEEP = "[" * 100_000


def trainer(options: TrainOptions, model: Any = None, task: Any = None) -> Trainer:
    return Trainer(model or toy_model(), toy_tokenizer(), task or SayTheWord(), options)


@pytest.fixture
def options(tmp_path: Path) -> TrainOptions:
    sizes = {"validation_size": 2, "test_size": 0, "prompts_per_step": 4, "samples_per_prompt": 2}
    return TrainOptions(task="say", output=tmp_path / "run", steps=2, trackers=(), validate_every=2, **sizes)


def resumed(options: TrainOptions, output: Path | None = None) -> TrainOptions:
    return TrainOptions(**vars(options) | {"resume": True, "steps": 3, "output": output or options.output})


BASE = Base("tiny", "float32", "f" * 64)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A checkpoint of three numbers and a matrix after four steps."""
    parameters = [torch.ones(3), torch.ones(2, 2)]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters])
    for _ in range(3):
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
    state = State(step=4, best_score=0.5, best_step=2, first_entropy=1.0, base_score=0)
    moments = optimizer_tensors(optimizer)
    Checkpoint(state, parameters, [torch.ones(3), torch.ones(2, 2)], BASE, moments, {"seed": 0}).save(
        tmp_path / "mine.safetensors"
    )
    return tmp_path / "mine.safetensors"


def read(path: Path, base: Base = BASE) -> Checkpoint:
    checkpoint = Checkpoint.load(path)
    checkpoint.check(path, base, [torch.ones(3), torch.ones(2, 2)])
    return checkpoint


def test_round_trip(sound):
    checkpoint = read(sound, Base("another name", "float32", "f" * 64))
    assert checkpoint.state.step == 4 and checkpoint.state.base_score == 0 and checkpoint.options == {"seed": 0}
    assert len(checkpoint.optimizer) == 6 and float(checkpoint.optimizer["1.step"]) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in (-5, 1.5, "1", None, True, [], 1, 1 << 31, float("inf"))),
        *(("best_step", value) for value in (-1, 5, 0.5, None)),
        *(("last_alarm", value) for value in (-2, 9, "x")),
        *(("rate_scale", value) for value in (-1, 0, 2, None, "1", float("nan"))),
        *(("best_score", value) for value in ("x", True, [], 10**400, float("nan"))),
        *((field, "x") for field in ("first_entropy", "first_kl", "base_score", "another")),
    ],
)
def test_fields_of_the_state(sound, field, value):
    tensors, metadata = read_safetensors(sound)
    state = json.dumps(json.loads(metadata["state"]) | {field: value})
    write_safetensors(sound, tensors, metadata | {"state": state})
    with pytest.raises(
        FileFormatError, match=rf"mine\.safetensors: (state.*{field}|state: not JSON|state.best_step|optim)"
    ):
        read(sound)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *((name, text) for name in ("state", "base", "options") for text in ("[]", "{", "5", DEEP, "[NaN]", None)),
        ("state", "{}"),
        ("base", '{"name": "tiny", "dtype": "float32"}'),
        ("base", '{"name": "tiny", "dtype": 32, "fingerprint": ""}'),
        ("base", json.dumps({"name": "tiny", "dtype": "bfloat16", "fingerprint": "f" * 64})),
        ("base", json.dumps({"name": "tiny", "dtype": "float32", "fingerprint": "e" * 64})),
        ("options", '{"steps": 3}'),
        ("options", '{"steps": "9"}'),
        ("format", "t2-expert"),
        ("format_version", "1"),
    ],
)
def test_metadata(sound, field, text):
    tensors, metadata = read_safetensors(sound)
    kept = {name: value for name, value in metadata.items() if name != field}
    write_safetensors(sound, tensors, kept if text is None else kept | {field: text})
    with pytest.raises(FileFormatError, match=rf"mine\.safetensors: (.*{field}|expected a t2-checkpoint)"):
        read(sound)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(
            (name, change)
            for name in ("parameters.0", "best.1", "optimizer.0.exp_avg", "optimizer.1.exp_avg_sq")
            for change in (
                lambda t: t[:-1].clone(),
                lambda t: t.double(),
                lambda t: t * float("nan"),
                lambda t: None,
            )
        ),
        ("optimizer.1.exp_avg_sq", lambda t: -t),
        *(
            ("optimizer.0.step", lambda t, v=v: torch.tensor(v))
            for v in (0.0, -1.0, 1.5, 5.0, float("nan"), [1.0, 2.0])
        ),
        *(
            (name, lambda t: torch.ones(3))
            for name in ("another", "parameters.2", "best.x", "optimizer.0.max_exp_avg_sq")
        ),
    ],
)
def test_tensors(sound, name, change):
    tensors, metadata = read_safetensors(sound)
    tensors[name] = change(tensors.get(name))
    write_safetensors(sound, {key: tensor for key, tensor in tensors.items() if tensor is not None}, metadata)
    with pytest.raises(FileFormatError, match=rf"mine\.safetensors: .*{name.split('.')[0]}"):
        read(sound)


@pytest.mark.parametrize("method", ["svf", "lora"])
def test_another_base_is_refused_before_anything_is_trained(options, tmp_path, method):
    options = TrainOptions(**vars(options) | {"method": method, "steps": 1, "lora_rank": 2})
    trainer(options)._save()
    other_embedding = toy_model()
    other_embedding.model.embed_tokens.weight.data[3, 3] += 1e-3
    for model in (toy_model(seed=7), toy_model().to(torch.bfloat16), other_embedding):
        with pytest.raises(FileFormatError, match=r"checkpoint\.safetensors: base: expected the weights that the run"):
            trainer(resumed(options), model)
    shutil.copytree(options.output, tmp_path / "moved")
    assert trainer(resumed(options, tmp_path / "moved")).state.step == 0


def test_rewards_that_are_no_numbers_stop_before_the_update(options):
    class Mine(SayTheWord):
        def rewards(self, problems, answers):
            return [self.reward] * len(answers)

    task = Mine()
    training = trainer(TrainOptions(**vars(options) | {"method": "lora"}), task=task)
    for task.reward in (float("nan"), None, "1.0"):
        with pytest.raises((ValueError, TypeError), match="reward: expected a finite number from task say"):
            training.step()
    assert training.state.step == 0 and not training.optimizer.state


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"step": "1"}', '{"step": 1.5}', '{"reward": 1}', '{"step": 1, "kl": "x"}', DEEP, '{"step": true}'],
)
def test_metrics_name_their_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1, "kl": NaN}}\n{{"st')
    with pytest.raises(FileFormatError, match=r"metrics\.jsonl, line 2: "):
        Metrics(path, 1)
    path.write_text('{"step": 0}\n{"step": 1, "kl": NaN}\n{"st')
    assert [row["step"] for row in Metrics(path, 1).rows] == [0, 1]


def test_metadata_of_the_task_goes_into_its_experts(options):
    class Mine(SayTheWord):
        def expert_metadata(self):
            return {"domains": '["a"]'}

    training = trainer(options, task=Mine())
    training._save_experts()
    assert Expert.load(options.output / "best.safetensors").metadata["domains"] == '["a"]'
