from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import t2kernels
from t2kernels.backends import extension

INSTRUCTION_SETS = [isa for isa in extension.compiled_isas() if extension.supported(isa)] if extension else []
"""The widest comes last."""
WIDEST = INSTRUCTION_SETS[-1] if INSTRUCTION_SETS else None
EXTREMES = list(dict.fromkeys(isa for isa in INSTRUCTION_SETS if isa in ("portable", WIDEST)))
HARDWARE_DOTS = {"avx512_bf16", "amx_bf16", "neon_bf16"}
"""Sets with dot products of bfloat16, which round in an order of their own."""


def select(isa: str) -> Iterator[str]:
    before = t2kernels.build_info()["chosen"]
    t2kernels.select_instruction_set(isa)
    yield isa
    t2kernels.select_instruction_set(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once on every set of CPU kernels that this processor supports."""
    yield from select(request.param)


@pytest.fixture(params=EXTREMES)
def extreme_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a sweep against float64 on the portable and the widest set: test_bit_equality.py has those in between."""
    yield from select(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
