from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2
from tests.t2.training.toy import toy_model

EXPERTS = ("red", "green", "classifier")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
