"""A few of the mutations of `tests/fuzz/files.py`, in this process; the script does many, in processes of their own."""

from __future__ import annotations

import importlib.util

import pytest

from tests.fuzz.files import KINDS, run

NEEDS = {"parquet": "pyarrow", "tuning": "triton", "gguf": "gguf", "image": "PIL"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_ends_in_anything_but_a_clear_error_or_a_sound_result(kind):
    if kind in NEEDS and importlib.util.find_spec(NEEDS[kind]) is None:
        pytest.skip(f"needs {NEEDS[kind]}")
    outcomes = list(run(kind, range(4), seed=1))
    assert len(outcomes) == 4 and not [outcome for outcome in outcomes if outcome.verdict == "BAD"]


def test_mutations_are_the_same_every_time_and_damage_is_found(tmp_path, monkeypatch):
    first, again = (list(run("expert", range(8))) for _ in range(2))
    assert [outcome.verdict for outcome in first] == [outcome.verdict for outcome in again]
    assert {outcome.verdict for outcome in first} == {"refused", "accepted"}
    monkeypatch.setattr("t2.Expert.load", lambda path: 1 / 0)
    assert {outcome.verdict for outcome in run("expert", range(3))} == {"BAD"}
