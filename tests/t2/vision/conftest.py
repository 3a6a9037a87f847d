from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from t2.training.options import TrainOptions


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
