from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from t2.training.options import TrainOptions


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that the planner's cost model is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _tiny_model(shared_cache: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2_CACHE", str(shared_cache))


@pytest.fixture
def make_options(make_options: Callable[..., TrainOptions]) -> Callable[..., TrainOptions]:
    """A step of a tiny model."""
    return partial(
        make_options,
        task="colours",
        steps=1,
        prompts_per_step=3,
        samples_per_prompt=3,
        skip_zero_advantage=False,
        validate_every=1,
        validation_size=4,
        test_size=0,
        learning_rate=2e-3,
    )
