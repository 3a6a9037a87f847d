"""The kernels that this installation has, and the ones that run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

_INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "neon", "neon_bf16")


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("t2kernels._C")
    except ImportError as error:
        return None, str(error)
    wanted = os.environ.get("T2KERNELS_CPU")
    if wanted and not module.supported(wanted):
        raise RuntimeError(
            f"T2KERNELS_CPU: expected an instruction set that this build and processor support "
            f"({[isa for isa in _INSTRUCTION_SETS if module.supported(isa)]}), got {wanted!r}"
        )
    return module, ""


extension, _why_not = _load_extension()
_warned: set[str] = set()


def warn_reference(device: str) -> None:
    """Says once per device type that operators run on the torch reference there."""
    if device in _warned:
        return
    _warned.add(device)
    reason = {
        "cpu": f"the C++ extension is not built ({_why_not})",
        "cuda": f"Triton kernels: {backends()['triton']}",
    }.get(device, "it has no kernels yet")
    warnings.warn(
        f"t2kernels: no kernel for device {device!r}: {reason}. Operators run on the plain torch reference: right, "
        "but slow, without batch invariance, and with a temporary copy of each weight in float32.",
        RuntimeWarning,
        stacklevel=2,
    )


def backends() -> dict[str, str]:
    """Every backend of the operators with "available" (and what it runs on) or why it is not.

    Keys: "cpu" (C++ kernels), "triton" (NVIDIA and AMD GPUs), "reference" (plain torch, every device).
    """
    cpu = f"available ({extension.chosen_isa()})" if extension else f"extension not built: {_why_not}"
    _, triton = _load_triton()
    return {"cpu": cpu, "triton": triton, "reference": "available"}


def triton_kernels() -> ModuleType | None:
    """The module of operators on Triton kernels, if they run on this machine's GPU."""
    return _load_triton()[0]


def device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Within it x's GPU is the current device, which Triton launches on."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return None, f"expected a GPU of compute capability 8.0 or more, got {major}.{minor}"
    return importlib.import_module("t2kernels.triton.launch"), f"available ({torch.cuda.get_device_name()})"


def build_info() -> dict[str, object]:
    """The build of the C++ extension: compiler, instruction sets (compiled, supported here, chosen)."""
    if extension is None:
        return {"extension": False, "reason": _why_not}
    return {
        "extension": True,
        "compiler": extension.compiler(),
        "instruction_sets": extension.compiled_isas(),
        "supported": [isa for isa in extension.compiled_isas() if extension.supported(isa)],
        "chosen": extension.chosen_isa(),
    }


def select_instruction_set(name: str) -> None:
    """Makes the CPU operators run on a set of `build_info()["supported"]` from now on; ValueError for another one.

    The same choice is made for a whole process by the environment variable T2KERNELS_CPU.
    """
    if extension is None:
        raise RuntimeError(f"select_instruction_set: the C++ extension is not built: {_why_not}")
    if not extension.select_isa(name):
        raise ValueError(
            f"name: expected an instruction set that this build and processor support "
            f"({[isa for isa in _INSTRUCTION_SETS if extension.supported(isa)]}), got {name!r}"
        )
