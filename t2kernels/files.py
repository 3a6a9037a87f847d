"""Files that appear whole or not at all, and where this package keeps things between runs."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of JSON that is read."""
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


KEPT_DAYS = 60
"""What a cache holds and nothing has used for so long is deleted when something new is put there."""


def delete_unused(paths: Iterable[Path]) -> None:
    """Deletes files and folders of a cache that are older than `KEPT_DAYS`; whoever uses one sets its time (touch)."""
    for path in paths:
        with suppress(OSError):  # another process may be at it
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def cache_root() -> Path:
    """`$T2_CACHE`, `$XDG_CACHE_HOME/t2` or `~/.cache/t2`."""
    if root := os.environ.get("T2_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "t2"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; OSError with the path and the cause if it can't be written."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(text)


def strict_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse JSON from outside the program. Only ValueError is raised, whatever the text is.

    Refused beside what is no JSON: NaN and Infinity and numbers that overflow a float (unless `finite` is False),
    nesting deeper than `MAX_DEPTH`, and strings that are no Unicode text (half a surrogate pair), all of which fail
    later and elsewhere. The depth is checked before the text is parsed, and no stack gets deep.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    value = (_FINITE if finite else _ANY_NUMBER).decode(text)
    if _SURROGATE.search(text):
        _check_strings(value)
    return value


def _no_number(text: str) -> float:
    raise ValueError(f"expected finite numbers, got {text}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {text:.40}")
    return value


_FINITE = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite)
_ANY_NUMBER = json.JSONDecoder()


def _check_depth(text: str) -> None:
    """ValueError if brackets outside strings are nested deeper than `MAX_DEPTH`."""
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text):
        if text[token.start()] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        elif text[token.start()] != '"':
            depth -= 1


def _check_strings(value: Any) -> None:
    """ValueError for strings that UTF-8 cannot hold."""
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, dict | list):
        for each in value if isinstance(value, list) else (*value.keys(), *value.values()):
            _check_strings(each)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to, which takes its place when the block is left without an error.

    It is synced and renamed over `path`, then the folder is synced: a reader sees the old file or the new one, also
    after a crash. Folders above `path` are created.
    """
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # with the permissions of a new file, which a library may narrow to the owner's
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # the parent may be a regular file
            temporary.unlink(missing_ok=True)


def temporary_sibling(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def sync(path: Path) -> None:
    """Makes what was written to a file or folder survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
