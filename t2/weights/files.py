"""Safetensors and JSON with clear errors, and folders that appear whole or not at all. Never pickle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2kernels.files import replacing, strict_json, sync, temporary_sibling

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class FileFormatError(ValueError):
    """A file is not what it should be: of another format or version, truncated, or corrupt."""


@contextmanager
def file_errors(where: str | Path) -> Iterator[None]:
    """Turn errors about the content of a file into a FileFormatError that starts with `where`, its path or place.

    Meant for the block that makes objects of what was read. A FileFormatError passes as it is: it names its file.
    """
    try:
        yield
    except FileFormatError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise FileFormatError(f"{where}: {reason}") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """Parse JSON that came from a file; `where` names the file, and the field or line if there is one.

    Raises:
        FileFormatError: it is no JSON, holds NaN or numbers that overflow, is nested deeper than
            `t2kernels.files.MAX_DEPTH`, or has strings that are no Unicode text.
    """
    try:
        return strict_json(text)
    except ValueError as error:
        raise FileFormatError(f"{where}: not JSON ({error})") from error


def check_regular(path: str | Path, what: str) -> None:
    """Raise unless there is a regular file, or a link to one, at `path`: pipes and devices would never end.

    Raises:
        FileNotFoundError: there is nothing, or a folder. FileFormatError: something else.
    """
    path = Path(path)
    if path.is_file():
        return
    if not path.exists():
        raise FileNotFoundError(f"{what} {path} does not exist")
    if path.is_dir():
        raise FileNotFoundError(f"{what} {path} is a folder")
    raise FileFormatError(f"{what} {path} is no regular file, but a pipe, socket or device")


def read_json(path: str | Path, what: str = "file") -> Any:
    """The content of a JSON file; `what` is the noun for it in errors.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileFormatError: as `parse_json`.
        OSError: the file cannot be read; the message names it.
    """
    path = Path(path)
    check_regular(path, what)
    return parse_json(path.read_bytes(), f"{what} {path}")


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
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def open_safetensors(path: str | Path, what: str = "file") -> Iterator[Any]:
    """A `safetensors.safe_open` handle (CPU), which reads the header alone. Raises as `read_safetensors` does."""
    path = Path(path)
    check_regular(path, what)
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


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in contiguous row-major order; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy declares the buffer protocol from 3.12 on


def content_digest(tensor: Tensor) -> str:
    """A fast hash (XXH3, 128 bits) of the tensor's bytes: finds damage, but is no protection against forgery."""
    return str(xxhash.xxh3_128_hexdigest(raw_bytes(tensor)))
