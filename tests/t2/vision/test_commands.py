"""From a folder with a model that reads images, and the official files of a task, to an expert that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import t2
from t2 import tasks
from t2.cli import main
from t2.tasks.images import open_image
from t2.weights.files import FileFormatError
from t2.weights.loading import tokenizer_of
from tests.t2.tasks.vqa_files import okvqa_files, textvqa_files
from tests.t2.vision.tiny_vlm import tiny_vlm

LOADED = ("llava_next", "idefics3", "qwen2_5_vl")  # SmolVLM2's own processor needs torchvision, for its videos


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return int(ended.value.code or 0)


def saved(folder: Path, family: str) -> Path:
    model, processor = tiny_vlm(family)
    model.save_pretrained(folder / family)
    processor.save_pretrained(folder / family)
    return folder / family


@pytest.mark.parametrize("family", LOADED)
def test_load_gives_the_processor_in_the_tokenizers_place(tmp_path: Path, family: str):
    folder = saved(tmp_path, family)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
    model, processor = t2.load(folder, dtype=torch.bfloat16)
    kind, _ = tiny_vlm(family)
    assert type(model) is type(kind) and not model.training and model.dtype == torch.bfloat16
    assert model.name_or_path == str(folder)
    assert hasattr(processor, "image_processor") and tokenizer_of(processor) is processor.tokenizer
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token == "<pad>"
    processor.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (folder / "processor_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer_of(tokenizer) is tokenizer
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="safetensors only, never pickle"):
        t2.load(folder)


@pytest.mark.parametrize("family", LOADED)
def test_train_on_textvqa_and_answer(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]):
    folder, data = saved(tmp_path, family), textvqa_files(tmp_path / "textvqa")
    options: dict[str, Any] = {"data": str(data), "validation_size": 2, "graded_reward": True, "max_new_tokens": 3}
    arguments: list[object] = ["train", folder, "--task", "textvqa", "--task-options", json.dumps(options)]
    arguments += ["--output", tmp_path / "run", "--target-modules", "mlp", "--prompts-per-step", 2, "--trackers"]
    assert run(*arguments, "--steps", 1) == 0
    assert run(*arguments, "--steps", 2, "--resume") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["test_problems"] == 3
    expert = t2.Expert.load(tmp_path / "run" / "best.safetensors")
    assert len(expert.layout.names) == 6 and expert.metadata["task"] == "textvqa"
    images = sorted((data / "train_images").glob("val*"))[:2]
    capsys.readouterr()
    assert run("generate", folder, "--prompt", "what", "is it red", "--image", *images, "--max-new-tokens", 2) == 0
    assert "> what\n" in capsys.readouterr().out
    assert run("generate", folder, "--prompt", "what colour", "--max-new-tokens", 2) == 0
    assert run("generate", folder, "--prompt", "a", "b", "c", "--image", *images) == 2
    assert "image: expected none, one, or one for each of 3 prompts, got 2" in capsys.readouterr().err
    assert run("generate", folder, "--prompt", "a", "--image", tmp_path / "absent.jpg") == 2
    assert "absent.jpg does not exist" in capsys.readouterr().err


def test_images_are_refused_by_a_model_of_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = okvqa_files(tmp_path / "okvqa")
    options = json.dumps({"data": str(data), "validation_size": 1})
    arguments = ["--task", "okvqa", "--task-options", options, "--output", tmp_path / "run", "--trackers"]
    assert run("train", folder, *arguments) == 2
    assert "tokenizer: expected the processor of a model that reads images" in capsys.readouterr().err


def test_rows_of_ones_own_name_their_images(tmp_path: Path):
    data = textvqa_files(tmp_path / "textvqa") / "train_images"
    user = {"role": "user", "content": [{"type": "text", "text": "which"}, {"type": "image"}, {"type": "image"}]}
    rows = [
        {"prompt": "what colour is it", "image": "trainred.jpg", "answer": "red"},
        {"messages": [user], "images": ["trainred.jpg", "trainblue.jpg"], "answer": "the second"},
        {"prompt": "what is it", "answer": "a cat"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.get(f"jsonl:{file}", images=data)
    problems = {
        problem.solution: problem for split in ("train", "validation", "test") for problem in task.problems(split)
    }
    red = problems["red"]
    assert red.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what colour is it"}]
    assert open_image(red.images[0]).getpixel((1, 1))[0] > 150
    assert [image.key for image in problems["the second"].images] == ["trainred.jpg", "trainblue.jpg"]
    assert problems["a cat"].messages[0]["content"] == "what is it" and problems["a cat"].images == ()
    for row, match in (
        ({"messages": [user], "image": "trainred.jpg"}, r"field 'messages': expected 1 times \{'type': 'image'\}"),
        ({"prompt": "a", "images": "trainred.jpg"}, r"field 'images': expected a list of names of files"),
    ):
        file.write_text(json.dumps(row | {"answer": ""}) + "\n")
        with pytest.raises(FileFormatError, match=match):
            tasks.get(f"jsonl:{file}", images=data).problems("train")
