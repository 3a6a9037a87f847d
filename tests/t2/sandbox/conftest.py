from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _turn(sandbox_turn: None) -> None:
    pass
