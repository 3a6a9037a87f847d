from __future__ import annotations

import pytest

from t2.eval.sections import figures


def test_figures_beside_the_base():
    base, scores = [1.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]
    found = figures(scores, base)
    assert (found["accuracy"], found["better"], found["worse"]) == (0.8, 3, 1)
    assert found["normalised"] == pytest.approx(2.0) and found["p"] == pytest.approx(0.625)
    assert "better" not in figures(scores)
    assert figures(scores, [0.0] * 5)["normalised"] is None
