from __future__ import annotations

import pytest

from t2.training import metrics
from t2.training.metrics import Metrics, plot


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (kept.append(self), save(self, *args, **kwargs))
    )
    return kept


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes if axes.get_visible()}


def test_panels_are_those_of_the_run_with_the_same_steps_and_accuracy_from_0_to_100(tmp_path, drawn):
    kept = Metrics(None)
    kept.add({"step": 0, "base": 0.25, "validation": 0.25})
    for step in (1, 2, 3):
        kept.add({"step": step, "loss": 3.0 / step, "length": 5.0, "kl": None})
    plot(kept, tmp_path / "curve.png", "a next-token run", 0)
    found = panels(drawn[0])
    assert list(found) == ["validation accuracy, %", "loss", "completion length, tokens"]
    assert len({axes.get_xlim() for axes in found.values()}) == 1
    low, high = found["validation accuracy, %"].get_ylim()
    assert low < 0 and high > 100
    assert found["validation accuracy, %"].lines[0].get_marker() == "o"  # a single point is seen


def test_long_runs_are_lines_and_empty_ones_an_empty_panel(tmp_path, drawn):
    kept = Metrics(None)
    plot(kept, tmp_path / "curve.png", "nothing yet")
    assert list(panels(drawn[0])) == ["validation accuracy, %"]
    for step in range(1, metrics.FEW + 2):
        kept.add({"step": step, "reward": 0.1, "loss": 1.0, "kl": 0.1, "entropy": 1.0, "length": 3.0})
    plot(kept, tmp_path / "curve.png", "rewards")
    assert len(panels(drawn[1])) == 6 and panels(drawn[1])["mean reward"].lines[0].get_marker() == "None"
