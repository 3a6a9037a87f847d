"""The journey runs what the quickstart says."""

from __future__ import annotations

from benchmarks.journey.run import PEER, commands, lines_of, lines_of_page, sections
from t2.cli.app import COMMANDS


def test_every_section_behind_the_installation_is_run():
    found = dict(sections())
    assert [heading.partition(".")[0] for heading in found] == [str(i) for i in range(2, 2 + len(found))]
    words = [
        line for blocks in found.values() for language, text in blocks if language == "bash" for line in commands(text)
    ]
    assert words and all(line[0] == "t2" and line[1] in COMMANDS for line in words)
    assert sum(line[1] == "serve" for line in words) == 1
    assert 10 < lines_of_page() < lines_of(PEER)
