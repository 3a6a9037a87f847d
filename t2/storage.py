"""Files on disk: the cache root, atomic writes, and safetensors with clear errors. Never pickle."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class FileFormatError(ValueError):
    """A file is not what it should be: of another format or version, truncated, or corrupt."""


def cache_root() -> Path:
    """Where this package keeps things between runs: `$T2_CACHE`, `$XDG_CACHE_HOME/t2` or `~/.cache/t2`."""
    if root := os.environ.get("T2_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "t2"


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (any device or strides) and `metadata` to `path`, whole or not at all.

    A temporary file beside `path` is written, synced and renamed over it, then the folder is synced: a reader sees the
    old file or the new one, also after a crash. Folders above `path` are created.

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
    with _replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all, as `write_safetensors` does."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to, which takes its place when the block is left without an error."""
    temporary = _temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # with the permissions of a new file, which the library narrows to the owner's
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        _remove(temporary)


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
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist" if not path.exists() else f"{what} {path} is a folder")
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
    temporary = _temporary_sibling(path)
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _sync(entry)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not path.is_dir():
                raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in contiguous row-major order; no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy declares the buffer protocol from 3.12 on


def _temporary_sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _remove(path: Path) -> None:
    with suppress(OSError):  # the parent may be a regular file
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
