from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _toy_model(own_cache: None, one_thread: None) -> None:
    pass
