from __future__ import annotations

import pytest

import t2kernels
from t2kernels.backends import extension

INSTRUCTION_SETS = [isa for isa in extension.compiled_isas() if extension.supported(isa)] if extension else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Runs a test once on every set of CPU kernels that this processor supports."""
    before = t2kernels.build_info()["chosen"]
    t2kernels.select_instruction_set(request.param)
    yield request.param
    t2kernels.select_instruction_set(before)


@pytest.fixture
def threads():
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
