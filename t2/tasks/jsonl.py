"""A task of the user's own: a JSONL file and a function that says how good an answer is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from t2.tasks.base import Problem, Split, Task, finite_numbers, user_message
from t2.tasks.data import Data, HubDataset, Row, hold_out, read_problems, read_rows, read_split
from t2.tasks.dataset_task import check_size, check_split
from t2.tasks.images import StoredImage
from t2.weights.files import FileFormatError, file_errors

Reward = Callable[[str, dict[str, Any]], float]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def equals_answer(answer: str, row: dict[str, Any]) -> float:
    """1 if the stripped answer is the row's "answer", else -1."""
    return 1.0 if answer.strip() == str(row["answer"]).strip() else -1.0


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" or "folder/file.py:function" names.

    Raises:
        ValueError: the name is not of this form, or the module has no such function.
        FileNotFoundError, ImportError: there is no such file or module.
    """
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute):
        raise ValueError(f"reward: expected 'module:function' or 'file.py:function', got {name!r}")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"reward: file {path} does not exist")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward: {place} has no function {attribute!r}")
    return function


def _without_nulls(message: Any) -> Any:
    """A message whose parts lack the keys that are null: Parquet gives all parts the same keys."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return message
    return message | {"content": [{k: v for k, v in part.items() if v is not None} for part in content]}


def _is_message(message: Any) -> bool:
    """Whether chat templates take it: a role, and a text or parts, each {"type": "image"} or one with a text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, list) and bool(content) and all(map(_is_part, content)))


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part == {"type": "image"} or (part.get("type") == "text" and isinstance(part.get("text"), str))


class JsonlTask(Task):
    """Rows with "prompt" (a text) or "messages" (a conversation), and whatever the reward function needs. "image" or
    "images" name the image files that stand before the prompt, or where the messages have {"type": "image"}.

    The reward is what training maximises, as the function gives it. The score is 1 where the reward is 1 or more, else
    0. "answer", if a row has one, is the solution for the next-token objective.

    Args:
        data: a JSONL or Parquet file, of which validation and test are held out; or a folder or mapping with a file
            for each split (`t2.tasks.data.read_split`).
        reward: `reward(answer, row) -> float`, or its name (`load_function`); default `equals_answer`.
        validation_size, test_size: problems held out of one file; default a tenth each.
        images: folder of the image files; default the data's.
        system_prompt: put before a row's "prompt"; None for none.
        max_new_tokens: room for an answer.
    """

    def __init__(
        self,
        data: Data,
        reward: Reward | str | None = None,
        *,
        validation_size: int | None = None,
        test_size: int | None = None,
        images: str | Path | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        if data is None:
            raise ValueError("data: expected a file, a folder, or files by split, got None")
        for name, size in (("validation_size", validation_size), ("test_size", test_size)):
            if size is not None:
                check_size(name, size)
        check_size("max_new_tokens", max_new_tokens)
        self.reward: Reward = load_function(reward) if isinstance(reward, str) else reward or equals_answer
        if not callable(self.reward):
            raise TypeError(f"reward: expected a function or its name, got {type(reward).__name__}")
        self.name = f"jsonl:{data}" if isinstance(data, str | Path) else "jsonl"
        self.data = data
        self.validation_size = validation_size
        self.test_size = test_size
        self.images = images
        self.system_prompt = system_prompt
        self.max_new_tokens = max_new_tokens

    def problems(self, split: Split) -> Sequence[Problem]:
        check_split(self, split, SPLITS)
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        if not (isinstance(self.data, str | Path) and Path(self.data).expanduser().is_file()):
            files = HubDataset(self.name, splits=SPLITS)
            return {
                split: read_problems(read_split(self.data, files, split), self.problem, f"data: split {split!r}")
                for split in SPLITS
            }
        every = read_problems(read_rows(self.data), self.problem, str(self.data))
        tenth = max(1, len(every) // 10)
        with file_errors(self.data):
            rest, test = hold_out(every, self.test_size or tenth, "test_size")
            train, validation = hold_out(rest, self.validation_size or tenth, "validation_size")
        return {"train": train, "validation": validation, "test": test}

    def problem(self, row: Row) -> Problem:
        images = self._images(row)
        if "messages" in row.fields:
            messages = [_without_nulls(message) for message in row.get("messages", list)]
            if not messages or not all(map(_is_message, messages)):
                expected = "a list of {'role': text, 'content': text or a list of parts}, parts with 'type' and 'text'"
                raise row.error("messages", expected, messages)
            conversation = tuple({"role": m["role"], "content": m["content"]} for m in messages)
            parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
            if sum(part == {"type": "image"} for part in parts) != len(images):
                raise row.error("messages", f"{len(images)} times {{'type': 'image'}}, as there are images", messages)
        else:
            system = ({"role": "system", "content": self.system_prompt},) if self.system_prompt else ()
            conversation = (*system, user_message(row.text("prompt"), len(images)))
        answer = row.fields.get("answer")
        if self.reward is equals_answer and "answer" not in row.fields:
            raise FileFormatError(f"{row.where}: no field 'answer', which a task without a reward function needs")
        if self.reward is equals_answer and not isinstance(answer, str | int | float):
            raise row.error("answer", "a text or a number, which the model's answer is to equal", answer)
        return Problem(conversation, dict(row.fields), None if answer is None else str(answer), images)

    def _images(self, row: Row) -> tuple[StoredImage, ...]:
        given = row.fields.get("images", [row.fields["image"]] if "image" in row.fields else [])
        if not isinstance(given, list) or not all(isinstance(each, str | StoredImage) for each in given):
            raise row.error("images", "a list of names of files", given)
        files = [self._image_folder() / name for name in given if isinstance(name, str)]
        try:
            return tuple(StoredImage.of_file(file) for file in files) or tuple(given)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{row.where}: {error}") from error

    def _image_folder(self) -> Path:
        if self.images is None and not isinstance(self.data, str | Path):
            raise ValueError("images: expected the folder of the image files that the data names, got none")
        folder = Path(str(self.images or self.data)).expanduser()
        return folder.parent if folder.is_file() else folder

    def rewards(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [self._reward(problem.reference, answer) for problem, answer in zip(problems, answers, strict=True)]

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        return [float(reward >= 1) for reward in self.rewards(problems, answers)]

    def _reward(self, row: dict[str, Any], answer: str) -> float:
        return finite_numbers("reward", self, [self.reward(answer, row)], [answer])[0]
