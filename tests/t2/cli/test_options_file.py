from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import tyro

from t2.cli.app import main
from t2.cli.options_file import with_options_file
from t2.cli.train import run
from t2.training.options import TrainOptions


def parsed(arguments):
    kept = {}

    @functools.wraps(run)
    def keep(model, training):
        kept.update(model=model, training=training)

    tyro.cli(keep, args=with_options_file(["train", *arguments])[1:])
    return TrainOptions(**vars(kept["training"]))


def test_the_options_of_a_run_give_the_same_run(tmp_path):
    path = tmp_path / "options.json"
    options = TrainOptions(
        "jsonl:a file.jsonl",
        tmp_path / "new",
        task_options='{"max_new_tokens": 3}',
        support=8,
        decay=True,
        skip_zero_advantage=False,
        target_modules=("q_proj", "k_proj"),
        trackers=(),
        start=Path("-e.safetensors"),
        learning_rate=1.25e-05,
    )
    path.write_text(json.dumps(options.to_dict()))
    assert parsed(["model", "--options", str(path), "--output", str(options.output)]) == options
    assert parsed(["model", f"--options={path}", "--output", str(options.output)]) == options


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"task": "gsm8k", "steps": 7, "learning_rate": 0.5, "decay": True}))
    found = parsed(
        ["model", "--output", "x", "--steps", "3", "--no-decay", "--options", str(path), "--learning_rate=0.25"]
    )
    assert (found.task, found.steps, found.learning_rate, found.decay) == ("gsm8k", 3, 0.25, False)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "expected a JSON object of options, got list"),
        ('{"stepz": 1}', "expected options of t2 train, got stepz"),
        ('{"steps": {"a": 1}}', "steps: expected a value that an option can have"),
        ("{", "o.json"),
    ],
)
def test_files_that_are_none_are_refused_by_name(tmp_path, content, said):
    path = tmp_path / "o.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        with_options_file(["train", "model", "--options", str(path)])
    assert str(path) in str(error.value)


def test_an_option_without_a_file_or_a_missing_file_ends_with_one_line(tmp_path, capsys):
    for words in (["--options"], ["--options", "--output"], ["--options", str(tmp_path / "none.json")]):
        with pytest.raises(SystemExit) as stop:
            main(["train", "model", *words])
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("t2: ")
    with pytest.raises(ValueError, match="expected one JSON file"):
        with_options_file(["train", "--options=a", "--options=b"])
