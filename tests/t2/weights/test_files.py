from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2.weights import files as storage
from t2.weights.files import FileFormatError, atomic_directory, parse_json, read_safetensors, write_safetensors
from t2kernels.files import cache_root, strict_json


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("T2_CACHE")
    assert cache_root() == tmp_path / "xdg" / "t2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "t2"


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (5, 7)])
def test_round_trip_of_every_dtype(tmp_path, dtype, shape):
    tensor = (torch.rand(shape) * 50).to(dtype)
    write_safetensors(tmp_path / "deep" / "x.safetensors", {"x": tensor}, {"k": "värde"})
    tensors, metadata = read_safetensors(tmp_path / "deep" / "x.safetensors")
    assert tensors["x"].dtype == dtype and tensors["x"].shape == shape and metadata == {"k": "värde"}
    assert bytes(storage.raw_bytes(tensors["x"])) == bytes(storage.raw_bytes(tensor))


def test_strided_tensors_and_permissions(tmp_path):
    base = torch.randn(6, 4)
    write_safetensors(tmp_path / "x", {"t": base.T, "half": base[::2].half()}, {"a": "1"})
    tensors, metadata = read_safetensors(tmp_path / "x")
    assert torch.equal(tensors["t"], base.T) and torch.equal(tensors["half"], base[::2].half())
    assert metadata == {"a": "1"}
    (tmp_path / "other").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_overwrites_and_leaves_one_file(tmp_path):
    for value in (1.0, 2.0):
        write_safetensors(tmp_path / "x", {"x": torch.tensor(value)}, {})
    assert read_safetensors(tmp_path / "x")[0]["x"] == 2 and os.listdir(tmp_path) == ["x"]


def test_readers_of_the_old_file_keep_it(tmp_path):
    write_safetensors(tmp_path / "x", {"x": torch.ones(1000)}, {})
    old = read_safetensors(tmp_path / "x")[0]["x"]
    write_safetensors(tmp_path / "x", {"x": torch.zeros(1000)}, {})
    assert (old == 1).all()


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "match"),
    [
        ({"x": 1}, {}, TypeError, r"tensors\['x'\] is int"),
        ({"x": torch.ones(2, device="meta")}, {}, ValueError, r"tensors\['x'\].* on meta"),
        ({}, {"version": 1}, TypeError, r"metadata\['version'\] is int"),
    ],
)
def test_rejects_what_the_format_cannot_hold(tmp_path, tensors, metadata, error, match):
    with pytest.raises(error, match=match):
        write_safetensors(tmp_path / "x", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(OSError, match=f"cannot write {path}: "):
            write_safetensors(path, {"x": torch.ones(1)}, {})
    with (
        pytest.raises(OSError, match=f"cannot write {tmp_path / 'file' / 'd'}: "),
        atomic_directory(tmp_path / "file" / "d"),
    ):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_disk_full_leaves_the_old_file_and_nothing_else(tmp_path):
    write_safetensors(tmp_path / "x", {"x": torch.ones(10)}, {})
    code = (
        "import resource, sys, torch; from t2.weights.files import write_safetensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_safetensors(sys.argv[1], {'x': torch.zeros(100_000)}, {})\n"
        "except OSError as e: print(e)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)
    assert f"cannot write {tmp_path / 'x'}: " in result.stdout and "File too large" in result.stdout, result.stderr
    assert os.listdir(tmp_path) == ["x"] and read_safetensors(tmp_path / "x")[0]["x"].sum() == 10


def test_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x", {"x": torch.ones(1)}, {})
    assert not os.listdir(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expert {tmp_path / 'x'} does not exist"):
        read_safetensors(tmp_path / "x", "expert")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("zip_format", [True, False])
def test_pickles_are_refused_unread(tmp_path, zip_format):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"x": torch.ones(3), "b": Bomb()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(FileFormatError, match="safetensors only, never pickle"):
        read_safetensors(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_every_truncation_is_seen(tmp_path):
    write_safetensors(tmp_path / "x", {"x": torch.arange(9.0), "y": torch.ones(2, 2)}, {"k": "v"})
    whole = (tmp_path / "x").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="truncated"):
            read_safetensors(tmp_path / "cut")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b + b"x",
        lambda b: b"\xff" * 8 + b[8:],
        lambda b: b[:8] + b"]" + b[9:],
        lambda b: b.replace(b"F32", b"F99"),
        lambda b: b.replace(b"[0,36]", b"[4,36]"),
        lambda b: b.replace(b"shape", b"shapo"),
        lambda b: b"hello world, this is a text file",
    ],
)
def test_corruption_is_seen(tmp_path, damage):
    write_safetensors(tmp_path / "x", {"x": torch.arange(9.0)}, {"k": "v"})
    (tmp_path / "x").write_bytes(damage((tmp_path / "x").read_bytes()))
    with pytest.raises(FileFormatError, match=r"bank .*x .*corrupt"):
        read_safetensors(tmp_path / "x", "bank")


def test_atomic_directory(tmp_path):
    with atomic_directory(tmp_path / "a" / "d") as folder:
        (folder / "one").write_text("1")
        assert folder.parent == tmp_path / "a" and not (tmp_path / "a" / "d").exists()
    assert (tmp_path / "a" / "d" / "one").read_text() == "1" and os.listdir(tmp_path / "a") == ["d"]


def test_atomic_directory_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as folder:
        (folder / "one").write_text("1")
        raise RuntimeError
    assert not os.listdir(tmp_path)


def test_atomic_directory_keeps_the_winner(tmp_path):
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "one").write_text("late")
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "one").write_text("first")
    assert (tmp_path / "d" / "one").read_text() == "first" and os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[NaN]",
        "[-Infinity]",
        "[1e999]",
        "9" * 5000,
        "[" * 101 + "]" * 101,
        "[" * 10**6,
        '["a", ' + '{"[": "]\\"]", "b": ' * 101 + "1" + "}" * 101 + "]",
        '["\\udc00"]',
        b"\xff",
    ],
)
def test_json_that_is_refused(text):
    with pytest.raises(FileFormatError, match=r"^here, line 3: not JSON"):
        parse_json(text, "here, line 3")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100 + "]" * 100,
        '["' + "[" * 1000 + '\\"' + "{" * 1000 + '"]',
        "[" + "[[]], " * 1000 + "{}]",
        "[" + '"[{", ' * 1000 + "1]",
        '["\\ud83d\\ude00", "\\\\ud800"]',
        "[1.5, 1e-400, 12345678901234567890]",
    ],
)
def test_json_that_is_read(text):
    assert parse_json(text, "here") == json.loads(text)


def test_the_depth_of_json_is_found_without_a_deep_stack():
    """An error on a full stack also reaches finalizers that happen to run there."""
    stack, text = sys.getrecursionlimit(), "[" * 100_000
    depth = len(inspect.stack())
    sys.setrecursionlimit(depth + 30)
    try:
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            strict_json(text)
    finally:
        sys.setrecursionlimit(stack)
