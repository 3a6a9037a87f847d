"""This machine's peaks: bytes read and FMAs a second, with the kernels' own instructions."""

from __future__ import annotations

import torch

from t2kernels.backends import extension

ARITHMETIC = ("float32", "bfloat16", "int16", "int8")
"""Kinds of multiply-adds: bfloat16 and int16 ones take two 16-bit terms a lane, int8 ones four bytes. Where the
processor has no bfloat16 ones their rate is 0, and bfloat16 factors are multiplied in float32."""


class Reader:
    """Reads memory in the way a product with one row does, past every cache: each call goes on in a large buffer."""

    def __init__(self, buffer_bytes: int = 1 << 29) -> None:
        self._buffer = torch.ones(buffer_bytes, dtype=torch.uint8)
        self._at = 0

    def read(self, count: int) -> None:
        """Reads so many bytes, at most the buffer's size."""
        if extension is None:
            raise RuntimeError("Reader: expected the C++ extension, got an installation without it")
        if not 0 <= count <= self._buffer.numel():
            raise ValueError(f"count: expected 0 to {self._buffer.numel()} bytes, got {count}")
        if self._at + count > self._buffer.numel():
            self._at = 0
        extension.read_bytes(self._buffer.data_ptr() + self._at, count, torch.get_num_threads())
        self._at += count


def multiply_adds(arithmetic: str, count: int) -> int:
    """Does about so many multiply-adds from registers on all threads, and returns how many."""
    if extension is None:
        raise RuntimeError("multiply_adds: expected the C++ extension, got an installation without it")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic: expected one of {ARITHMETIC}, got {arithmetic!r}")
    threads = torch.get_num_threads()
    per_step = extension.multiply_adds(arithmetic, threads, 1)
    return extension.multiply_adds(arithmetic, threads, max(1, count // per_step)) if per_step else 0
