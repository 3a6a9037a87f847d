"""A conversation in the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from t2.generation.sampling import Sampling
from t2.server.chat import chat
from tests.t2.server.test_batch import opened


@pytest.fixture
def talk(bank, monkeypatch):
    def run(*lines: str) -> str:
        shown, given = io.StringIO(), iter(lines)
        console = Console(file=shown, width=200)

        def reply(prompt: str) -> str:
            shown.write(prompt)
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(console, "input", reply)
        model = opened(bank)
        assert chat(model, "base", Sampling(), 6, console) == 0
        assert model.engine.running == 0
        return shown.getvalue()

    return run


def test_a_conversation(talk):
    shown = talk(
        "/experts", "say red", "", "/expert red", "say red", "/expert nobody", "say", "/nonsense", "/reset", "say two"
    )
    assert shown.startswith("toy: toy, auto, red, green. /expert NAME")
    assert "[bold]red>[/bold]" in shown and "(red; " in shown and "(base; " in shown
    assert "expected one of toy, auto, red, green; got 'nobody'" in shown
    assert shown.count("/expert NAME") == 2


def test_the_automatic_choice_is_told(talk):
    assert "others " in talk("/expert auto", "say red")


def test_quit_ends_it(talk):
    assert "tokens)" not in talk("/quit", "say red")
