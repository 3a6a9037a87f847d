from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.training.options import TrainOptions


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
def make_options(tmp_path: Path) -> Callable[..., TrainOptions]:
    def make(**changes: Any) -> TrainOptions:
        defaults: dict[str, Any] = {
            "task": "say",
            "output": tmp_path / "run",
            "steps": 6,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "validate_every": 2,
            "validation_size": 8,
            "test_size": 8,
            "learning_rate": 5e-2,
            "trackers": (),
        }
        return TrainOptions(**defaults | changes)

    return make
