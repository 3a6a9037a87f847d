"""Builds the extension `t2kernels._C` (C++); all else about the package is in pyproject.toml.

Without its extension the package is many times slower, so a build that fails ends the installation.
T2KERNELS_NO_EXTENSION=1 installs without it: the operators then run on their plain torch reference, which `t2kernels`
says once when it is first used.
"""

import os
import sys

from setuptools import setup

WITHOUT = os.environ.get("T2KERNELS_NO_EXTENSION", "") not in ("", "0")
ADVICE = (
    "t2kernels: building needs a C++20 compiler, and torch, ninja and pybind11 in this environment or "
    "without --no-build-isolation. T2KERNELS_NO_EXTENSION=1 installs without kernels; operators are then slow."
)
try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    if not WITHOUT:
        sys.exit(f"t2kernels: the C++ extension can't be built: {error}.\n{ADVICE}")


def build_extension() -> type:
    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                raise SystemExit(f"t2kernels: the C++ extension was not built ({cause}).\n{ADVICE}") from error

    return Build


TORCH_TARGET_VERSION = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def extension() -> "CppExtension":
    import pybind11

    return CppExtension(
        "t2kernels._C",
        sources=[
            "csrc/binding.cpp",
            "csrc/cpu/dispatch.cpp",
            "csrc/cpu/portable.cpp",
            "csrc/cpu/avx2.cpp",
            "csrc/cpu/avx512.cpp",
            "csrc/cpu/avx512_bf16.cpp",
            "csrc/cpu/amx_bf16.cpp",
            "csrc/cpu/neon.cpp",
            "csrc/cpu/neon_bf16.cpp",
        ],
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=[TORCH_TARGET_VERSION],
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-maybe-uninitialized",
        ],
    )


if WITHOUT:
    print(f"t2kernels: installing without the C++ extension, as T2KERNELS_NO_EXTENSION asks. {ADVICE}")
    setup()
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_extension()})
