"""How far launches fill a chip: the arithmetic by hand, and the results that docs/gpu.md shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import fill
from benchmarks.readme import RESULTS
from benchmarks.roofline import CHIPS
from t2kernels.triton.tuning import Tile

H200 = CHIPS["H200"]
TILE = Tile(64, 32, 128, 4, 5)  # 4 steps of 8 KB under way


def test_few_tiles_wait_for_latency_and_many_for_bandwidth():
    assert fill.seconds([2] * 32, 132, TILE, H200) == pytest.approx(0.8e-6)
    assert fill.seconds([32] * 32, 132, TILE, H200) == pytest.approx(0.8e-6 * 32 / 4)
    assert fill.seconds([32] * 132, 132, TILE, H200) == pytest.approx(132 * 32 * 8192 / (0.85 * 4.8e12))
    assert fill.seconds([32] * 133, 132, TILE, H200) == pytest.approx(
        132 * 32 * 8192 / (0.85 * 4.8e12) + 0.8e-6 * 32 / 4
    )


def test_results_are_current():
    text = (RESULTS / "fill.json").read_text()
    assert text == fill.figures(), "regenerate: python benchmarks/fill.py"
    assert json.loads(text)["what"].startswith("predictions")


def test_split_k_saves_nothing_where_bandwidth_is_reached():
    for each in fill.results()["launches"]:
        assert each["us"] >= each["at_bandwidth_us"] - 1e-3
        assert 0 <= each["split_saves_us"] <= max(0.0, each["us"] - min(each["us"], each["at_bandwidth_us"])) + 1e-3
