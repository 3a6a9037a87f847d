from __future__ import annotations

from collections.abc import Callable

import pytest

import t2
from tests.t2.toy import toy_model

EXPERTS = ("red", "green", "classifier")


@pytest.fixture
def make_svf() -> Callable[..., t2.SVFModel]:
    """The toy model with three random experts that change its words."""

    def make(names: tuple[str, ...] = EXPERTS, std: float = 0.6) -> t2.SVFModel:
        svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
        for seed, name in enumerate(names):
            svf.add_expert(name, t2.Expert.random(svf.layout, std=std, seed=seed))
        return svf

    return make


@pytest.fixture
def svf(make_svf) -> t2.SVFModel:
    return make_svf()
