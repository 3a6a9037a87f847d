"""Files on disk: the cache root, atomic writes, and safetensors with clear errors. Never pickle."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


class FileFormatError(ValueError):
    """A file is not what it should be: of another format or version, truncated, or corrupt."""


def cache_root() -> Path:
    """Where this package keeps things between runs: `$T2_CACHE`, `$XDG_CACHE_HOME/t2` or `~/.cache/t2`."""
    if root := os.environ.get("T2_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "t2"


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` (any device, strides or sharing) and `metadata` to `path`, whole or not at all.

    A temporary file beside `path` is written, synced and renamed over it, then the folder is synced: a reader
    sees the old file or the new one, also after a crash. Folders above `path` are created.

    Raises:
        TypeError, ValueError: a tensor or metadata entry that the format cannot hold.
        OSError: the file could not be written (the message names the path and the cause); no temporary file
            stays.
    """
    path = Path(path)
    for key, text in metadata.items():
        if not (isinstance(key, str) and isinstance(text, str)):
            raise TypeError(f"metadata[{key!r}] is {type(text).__name__}, expected str keys and str values")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in DTYPE_NAMES or tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"tensors[{name!r}] is {tensor.dtype}, {tensor.layout}, on {tensor.device}; expected a "
                f"dense tensor with data and one of the dtypes {', '.join(DTYPE_NAMES.values())}"
            )
    temporary = _temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            _serialize(file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def read_safetensors(path: str | Path, what: str = "file") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (CPU) and the metadata of a safetensors file; `what` is the noun for it in errors.

    Raises:
        FileNotFoundError: there is no file at `path`.
        FileFormatError: it is a pickle (never loaded), truncated, or corrupt.
    """
    _, metadata = read_header(path, what)
    with open_safetensors(path, what) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping


def read_metadata(path: str | Path, what: str = "file") -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone. Raises as `read_safetensors` does."""
    return read_header(path, what)[1]


def read_header(path: str | Path, what: str = "file") -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by tensor name, and the metadata, from the header alone, whose promised size the file must have.

    Raises as `read_safetensors` does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist" if not path.exists() else f"{what} {path} is a folder")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        body = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(body)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if start.startswith(PICKLE_STARTS):
            problem = "is a pickle (torch.save): weights load from safetensors only, never pickle"
        elif size < 8 or (length <= MAX_HEADER_BYTES and size < 8 + length and body[:1] in (b"{", b"")):
            problem = f"is truncated: {size} bytes end inside the safetensors header"
        else:
            problem = "is not a safetensors file, or its header is corrupt"
        raise FileFormatError(f"{what} {path} {problem}") from error
    if size < end:
        raise FileFormatError(f"{what} {path} is truncated: {size} bytes, and its header promises {end}")
    if size > end:
        raise FileFormatError(f"{what} {path} is corrupt: {size} bytes, and its header promises {end}")
    return shapes, metadata


@contextmanager
def open_safetensors(path: str | Path, what: str = "file") -> Iterator[Any]:
    """A `safetensors.safe_open` handle (CPU), to read single tensors. Raises as `read_safetensors` does."""
    read_header(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise FileFormatError(f"{what} {path} is corrupt: {error}") from error


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


def _serialize(file: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors layout: u64 header length, JSON header padded to 8 bytes, tensors, widest dtype first.

    Written here rather than by `safetensors.save_file`, which cannot sync, leaves mode 0600, refuses tensors
    that share storage, and is slower. One tensor at a time is made contiguous.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(raw_bytes(tensors[name]))


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
