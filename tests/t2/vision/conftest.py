from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2.training.options import TrainOptions


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that the planner's cost model is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_CACHE", str(shared_cache))


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
            "task": "colours",
            "output": tmp_path / "run",
            "steps": 1,
            "prompts_per_step": 3,
            "samples_per_prompt": 3,
            "skip_even_prompts": False,
            "validate_every": 1,
            "validation_size": 4,
            "test_size": 0,
            "trackers": (),
        }
        return TrainOptions(**defaults | changes)

    return make
