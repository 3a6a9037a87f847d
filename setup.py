"""Builds the extensions `t2kernels._C` (C++) and `t2kernels._cuda`; all else about the package is in pyproject.toml.

A machine without a C++ compiler still installs: the operators then run on their plain torch reference, which
`t2kernels` says once when it is first used. T2KERNELS_REQUIRE_EXTENSION=1 turns a failed build into an error.
`t2kernels._cuda` is built where torch has CUDA and nvcc is there; TORCH_CUDA_ARCH_LIST names other GPUs than the usual.
"""

import os
import sys

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension


class BuildOrReference(BuildExtension):
    def run(self) -> None:
        compiler, inplace = self.compiler, self.inplace  # super().run() changes both
        try:
            super().run()
        except Exception as error:
            if os.environ.get("T2KERNELS_REQUIRE_EXTENSION"):
                raise
            if len(self.extensions) > 1:
                print(f"\nt2kernels: building without the CUDA kernels: {error}\n", file=sys.stderr)
                self.compiler, self.inplace, self.extensions = compiler, inplace, self.extensions[:1]
                return self.run()
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


def cuda_extensions() -> list[CppExtension]:
    if torch.version.cuda is None or CUDA_HOME is None:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "nvcc was not found"
        print(f"t2kernels: building without the CUDA kernels: {why}.", file=sys.stderr)
        return []
    import pybind11

    blackwell = tuple(int(n) for n in torch.version.cuda.split(".")[:2]) >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX" if blackwell else "8.0;9.0+PTX")
    return [
        CUDAExtension(
            "t2kernels._cuda",
            sources=["csrc/cuda/binding.cpp", "csrc/cuda/decode.cu"],
            include_dirs=[os.path.abspath("csrc/cuda"), pybind11.get_include()],
            define_macros=[TORCH_TARGET_VERSION, ("USE_CUDA", None)],
            extra_compile_args={
                "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra"],
                "nvcc": ["-O3", "-std=c++20"],
            },
        )
    ]


setup(ext_modules=[extension(), *cuda_extensions()], cmdclass={"build_ext": BuildOrReference})
