"""Launches compiled for sm_90 on a machine without a GPU: a stand-in for Triton's driver that runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from t2kernels.triton import kernels, launch


class _NoGpu:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches made inside are compiled, not run, and collected."""
    made: list[Any] = []

    class Collect:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: made.append(self.kernel.warmup(*args, grid=grid, **options))

    class Kernels:
        product, pull, gather = Collect(kernels.product), Collect(kernels.pull), Collect(kernels.gather)

    before = launch.kernels
    driver.set_active(_NoGpu())
    launch.kernels = Kernels  # type: ignore[assignment]
    try:
        yield made
    finally:
        launch.kernels = before
