"""Builds the extension `t2kernels._C` (C++); all else about the package is in pyproject.toml.

A machine without a C++ compiler still installs: the operators then run on their plain torch reference, which
`t2kernels` says once when it is first used. T2KERNELS_REQUIRE_EXTENSION=1 turns a failed build into an error.
"""

import os
import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


class BuildOrReference(BuildExtension):
    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("T2KERNELS_REQUIRE_EXTENSION"):
                raise
            print(
                f"\nt2kernels: the C++ extension was not built ({type(error).__name__}: {error}).\n"
                "t2kernels: installing without it; operators will run on the slower torch reference.\n",
                file=sys.stderr,
            )


TORCH_TARGET_VERSION = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def extension() -> CppExtension:
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


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOrReference})
