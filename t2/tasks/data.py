"""Rows of data sets: local JSONL and Parquet files, or the Hub through `datasets`, with errors that name the place."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from t2.tasks.base import Problem
from t2.tasks.images import StoredImage
from t2.weights.files import FileFormatError, check_regular, file_errors, parse_json, read_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
Data = str | Path | Mapping[str, str | Path] | None
"""Source of a task's rows: a folder, a file, files by split, or None for the Hub."""

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row, and where it is from. A field that is an image is a `StoredImage`: it stays in its file until read."""

    fields: Mapping[str, Any]
    where: str

    def text(self, field: str) -> str:
        """A field that has to be a non-empty string."""
        value = self.get(field, str)
        if not value.strip():
            raise self.error(field, "a non-empty string", value)
        return value

    def get(self, field: str, kind: type[T]) -> T:
        if field not in self.fields:
            raise FileFormatError(
                f"{self.where}: no field {field!r}; its fields are {', '.join(self.fields) or 'none'}"
            )
        value = self.fields[field]
        if not isinstance(value, kind):
            raise self.error(field, kind.__name__, value)
        return value

    def error(self, field: str, expected: str, got: Any) -> FileFormatError:
        return FileFormatError(f"{self.where}: field {field!r}: expected {expected}, got {got!r:.200}")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hub; `configs` are read one after the other."""

    name: str
    configs: tuple[str | None, ...] = (None,)
    splits: tuple[str, ...] = ("train", "test")


def read_split(data: Data, hub: HubDataset, split: str) -> list[Row]:
    """The rows of one of the data set's own splits.

    Args:
        data: a folder with files named `SPLIT.jsonl`, `SPLIT.jsonl.gz`, `SPLIT.parquet` or `SPLIT-*` (as on the Hub;
            subfolders too, below a folder named as the configuration if there is one), a mapping from splits to files,
            one file if the data set has but one split, or None for the Hub.
        hub: the data set.
        split: one of `hub.splits`.

    Raises:
        FileNotFoundError: there is no such file, or none for this split.
        FileFormatError: a file is not what its name says, or a line is not a JSON object.
        ImportError: `datasets` (or `pyarrow` for a Parquet file) is not installed.
        OSError: the Hub cannot be reached or does not have the data set.
    """
    if data is None:
        return [row for config in hub.configs for row in _read_hub(hub.name, config, split)]
    if isinstance(data, Mapping):
        if split not in data:
            raise ValueError(f"data: no file for split {split!r}, only for {', '.join(map(repr, data))}")
        return read_rows(data[split])
    path = Path(data).expanduser()
    if path.is_file():
        if len(hub.splits) > 1:
            splits = ", ".join(f"{name!r}: ..." for name in hub.splits)
            raise ValueError(f"data: {path} is one file; expected a folder with one for each split, or {{{splits}}}")
        return read_rows(path)
    files = _split_files(path, hub, split)
    return [row for file in files for row in read_rows(file)]


def _split_files(folder: Path, hub: HubDataset, split: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: {folder} does not exist")
    roots = [folder / config for config in hub.configs if config and (folder / config).is_dir()] or [folder]
    found = sorted(
        file
        for root in roots
        for file in root.rglob("*")
        if file.name.endswith(SUFFIXES) and file.name.startswith((f"{split}.", f"{split}-"))
    )
    if not found:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"data: no {split}.jsonl, {split}.parquet or {split}-* below {folder} (there: {there})")
    return found


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL (also .jsonl.gz) or Parquet file, known by its name."""
    path = Path(path).expanduser()
    check_regular(path, "data: file")
    if path.name.endswith(".parquet"):
        return list(_read_parquet(path))
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"data: expected a file named *{', *'.join(SUFFIXES)}, got {path}")
    return list(_read_jsonl(path))


def read_listed(path: Path, name: str) -> list[Row]:
    """The rows of a JSON file {name: [rows]}.

    Raises:
        FileNotFoundError: there is no such file. FileFormatError: it holds something else.
    """
    content = read_json(path, "data: file")
    listed = content.get(name) if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise FileFormatError(f'{path}: expected {{"{name}": [rows]}}, as the official file has them')
    return [Row(each, f"{path}, {name}[{i}]") for i, each in enumerate(listed)]


def _read_jsonl(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                fields = parse_json(line, where)
                if not isinstance(fields, dict):
                    raise FileFormatError(f"{where}: expected a JSON object, got {type(fields).__name__}")
                yield Row(fields, where)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileFormatError(f"{path}, after line {number}: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 't2kernels[tasks]'") from error
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            images = [column.name for column in file.schema_arrow if _holds_images(column.type)]
            others = [name for name in file.schema_arrow.names if name not in images]
            groups = [file.read_row_group(i, columns=others).to_pylist() for i in range(file.num_row_groups)]
    except (ArrowException, OSError, ValueError, TypeError, OverflowError) as error:  # whatever the damage hits
        raise FileFormatError(f"{path} is not a Parquet file, or damaged: {error}") from error
    number = 0
    for group, rows in enumerate(groups):
        for place, fields in enumerate(rows):
            number += 1
            where = f"{path}, row {number}"
            for name in images:
                fields[name] = StoredImage(where, where, partial(_parquet_image, path, name, group, place))
            yield Row(fields, where)


def _holds_images(kind: Any) -> bool:
    """Whether a Parquet column is of images as the Hub has them: {"bytes": binary, "path": string}."""
    from pyarrow import types

    return types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def _parquet_image(path: Path, column: str, group: int, place: int) -> bytes:
    return _image_bytes(_parquet_images(path, column, group)[place].as_py(), path.parent)


@lru_cache(maxsize=4)
def _parquet_images(path: Path, column: str, group: int) -> Any:
    """One row group's images; files of images have few rows in each."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    except (ArrowException, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is not a Parquet file, or damaged: {error}") from error


def _image_bytes(image: Mapping[str, Any] | None, folder: Path = Path()) -> bytes:
    """The file of {"bytes", "path"}; a path is meant where there are no bytes."""
    if image is None or not (image["bytes"] or image["path"]):
        raise ValueError("no image")
    return bytes(image["bytes"]) if image["bytes"] else (folder / image["path"]).read_bytes()


def _read_hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name} comes from the Hub by the package datasets: pip install 't2kernels[tasks]', "
            "or give local files by the option data"
        ) from error
    place = f"{name} ({config})" if config else name
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its errors are of many kinds: connection, Hub, builder, pyarrow
        raise OSError(f"data set {place}, split {split}, cannot be loaded from the Hub: {error}") from error
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for number, fields in enumerate(rows.remove_columns(images), 1):
        where = f"{place}, {split}, row {number}"
        for name in images:
            fields[name] = StoredImage(where, where, partial(_hub_image, rows, number - 1, name))
        yield Row(fields, where)


def _hub_image(rows: Any, index: int, name: str) -> bytes:
    return _image_bytes(rows[index][name])


def read_problems(rows: Sequence[Row], problem: Callable[[Row], Problem], where: str = "data") -> list[Problem]:
    """The problem of each row; a FileFormatError says which row it can't be made from.

    `where` names the data in the error for no rows at all.
    """
    if not rows:
        raise FileFormatError(f"{where}: expected at least one row, got an empty file")
    problems = []
    for row in rows:
        with file_errors(row.where):
            problems.append(problem(row))
    return problems


def prompt_key(problem: Problem) -> str:
    """Equal for equal prompts; images are told apart by their keys."""
    content = json.dumps(problem.messages, sort_keys=True) + "".join(f"\n{image.key}" for image in problem.images)
    return hashlib.sha256(content.encode()).hexdigest()


def hold_out(problems: Sequence[Problem], size: int, option: str) -> tuple[list[Problem], list[Problem]]:
    """Split off `size` examples: (the rest, those), each in the order given.

    The prompts' hashes choose them, so the split is the same on every machine and for any order of the file. No prompt
    is in both parts: copies of a prompt that is split off leave the rest too.

    Raises:
        ValueError: `size` leaves no problem for the rest; the message names the option that asked for it.
    """
    keys: dict[str, Problem] = {}
    for problem in problems:
        keys.setdefault(prompt_key(problem), problem)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < len(keys):
        raise ValueError(f"{option}: expected an integer in [0, {len(keys) - 1}] for {len(keys)} prompts, got {size!r}")
    taken = set(sorted(keys)[:size])
    rest = [problem for problem in problems if prompt_key(problem) not in taken]
    return rest, [problem for key, problem in keys.items() if key in taken]
