"""Safetensors with clear errors, and folders that appear whole or not at all. Never pickle."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2kernels.files import replacing, sync, temporary_sibling

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class FileFormatError(ValueError):
    """A file is not what it should be: of another format or version, truncated, or corrupt."""


def parse_json(text: str | bytes, where: object) -> Any:
    """JSON from outside; `where` is the file, and the field or line in it, for errors.

    Raises:
        FileFormatError: the text is no JSON, is nested too deep, or has a number that JSON lacks (NaN, Infinity).
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise FileFormatError(f"{where}: expected JSON, got one that is nested too deep") from error
    except (ValueError, OverflowError, MemoryError) as error:
        raise FileFormatError(f"{where}: expected JSON, got {error}") from error


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (any device or strides) and `metadata` to `path`, whole or not at all.

    As `t2kernels.files.replacing` does it: a reader sees the old file or the new one, also after a crash.

    Raises:
        TypeError, ValueError: a tensor or metadata entry that the format cannot hold.
        OSError: the file could not be written (the message names the path and the cause); no temporary file stays.
    """
    path = Path(path)
    for key, text in metadata.items():
        if not (isinstance(key, str) and isinstance(text, str)):
            raise TypeError(f"metadata[{key!r}] is {type(text).__name__}, expected str keys and str values")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"tensors[{name!r}] is {tensor.layout} on {tensor.device}; expected a dense tensor with data"
            )
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_safetensors(path: str | Path, what: str = "file") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (CPU) and the metadata of a safetensors file; `what` is the noun for it in errors.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileFormatError: it is a pickle (never loaded), truncated, or corrupt.
    """
    with open_safetensors(path, what) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise FileFormatError(f"{what} {path} holds tensors that can't be read ({error})") from error


@contextmanager
def open_safetensors(path: str | Path, what: str = "file") -> Iterator[Any]:
    """A `safetensors.safe_open` handle (CPU), which reads the header alone. Raises as `read_safetensors` does."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what} {path} {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as damaged:
            pickled = damaged.read(4).startswith(PICKLE_STARTS)
        problem = "a pickle: weights load from safetensors only, never pickle" if pickled else "truncated or corrupt"
        raise FileFormatError(f"{what} {path} is {problem} ({error})") from error


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Build a folder whole or not at all: yields a temporary sibling, renamed to `path` on success.

    On any failure the sibling is removed. If `path` has appeared meanwhile, the folder already there stays.

    Raises:
        OSError: the folder cannot be made; the message names the path and the cause.
    """
    path = Path(path)
    temporary = temporary_sibling(path)
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync(entry)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not path.is_dir():
                raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checksum(*tensors: Tensor) -> str:
    """32 hex digits over the dtypes, shapes and contents of tensors (XXH3): finds damage, not malice."""
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in contiguous row-major order; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy declares the buffer protocol from 3.12 on
