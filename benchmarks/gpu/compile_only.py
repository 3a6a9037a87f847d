"""Triton launches compiled ahead of time for a chip, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from t2kernels.triton import kernels, launch
from t2kernels.triton.tuning import Launch, Tile

SM_90 = GPUTarget("cuda", 90, 32)


class _NoGpu:
    """Triton driver that knows its chip and runs nothing. Each chip needs its own device: kernels are cached by it."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


class _Compile:
    """Kernel whose launches are compiled and collected, not run."""

    def __init__(self, kernel: Any, made: list[Any], wanted: Callable[[dict[str, Any]], bool]) -> None:
        self.kernel, self.arg_names, self.made, self.wanted = kernel, kernel.arg_names, made, wanted

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            if self.wanted(options):
                self.made.append((options, self.kernel.warmup(*args, grid=grid, **options)))

        return compile_only


@contextmanager
def compiling(
    target: GPUTarget = SM_90, device: int = 0, wanted: Callable[[dict[str, Any]], bool] = lambda options: True
) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Within the block, wanted launches are compiled for the target and listed with their options; none is run."""
    made: list[tuple[dict[str, Any], Any]] = []
    before = launch.kernels
    driver.set_active(_NoGpu(target, device))
    names = ("product", "pull", "gather")
    replaced: Any = SimpleNamespace(**{name: _Compile(getattr(kernels, name), made, wanted) for name in names})
    launch.kernels = replaced
    try:
        yield made
    finally:
        launch.kernels = before


@contextmanager
def using_tile(tile: Tile) -> Iterator[list[Launch]]:
    """Within the block, every launch takes this tile and is listed."""
    before, seen = launch.tile_for, []

    def take(own: Launch, device: torch.device) -> Tile:
        seen.append(own)
        return tile

    launch.tile_for = take  # type: ignore[assignment]
    try:
        yield seen
    finally:
        launch.tile_for = before
