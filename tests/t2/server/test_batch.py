"""A file of requests: all are answered once, also when the run is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import t2
from t2.generation.engine import Engine
from t2.generation.sampling import Sampling
from t2.server.batch import answer_file, answered, read_lines
from t2.server.opened import Opened
from t2.weights.files import FileFormatError
from tests.t2.toy import toy_model, toy_tokenizer

REQUESTS = [
    {"prompt": "say red"},
    {"prompt": "say green two", "model": "red", "id": "mine"},
    {"messages": [{"role": "user", "content": "say blue"}], "model": "green", "max_tokens": 3},
    {"prompt": "say one", "model": "red:0.5+green:0.5", "stop": "cat"},
    {"prompt": "say two", "model": "auto"},
    {"prompt": "say red", "temperature": 1.0, "seed": 4},
    {"prompt": "say red", "model": "nobody"},
    {"prompt": "say " * 70},
]


def opened(bank: Path) -> Opened:
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    return Opened(svf, toy_tokenizer(), Engine(svf, eos_ids=(2,), max_rows=3, max_tokens=60), "toy", bank)


def run(bank: Path, source: Path, output: Path) -> list[dict]:
    assert answer_file(opened(bank), read_lines(source), output, max_tokens=8, console=Console(quiet=True))
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    return sorted(entries, key=lambda entry: entry["index"])


def write(path: Path, requests: list) -> Path:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def test_every_line_gets_its_answer(bank, tmp_path):
    source = write(tmp_path / "in.jsonl", REQUESTS)
    found = run(bank, source, tmp_path / "out" / "answers.jsonl")
    assert [entry["index"] for entry in found] == list(range(len(REQUESTS)))
    assert [entry.get("expert") for entry in found[:4]] == ["base", "red", "green", "red:0.5+green:0.5"]
    assert found[1]["id"] == "mine" and found[2]["tokens"] <= 3 and found[4]["reason"]
    assert "nobody" in found[6]["error"]["message"] and "at most 0 behind this prompt" in found[7]["error"]["message"]
    again = run(bank, source, tmp_path / "again.jsonl")
    assert again == found


def test_sampling_of_the_command_line_is_that_of_lines_without_their_own(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "temperature": 0.0, "seed": 3}])
    first, second = (line.sampling(0) for _, line in read_lines(source, Sampling(0.5, 0.9, 7)))
    assert first == Sampling(0.5, 0.9, 7) and second == Sampling(0.0, 0.9, 3)
    first, second = (line.sampling(0) for _, line in read_lines(source))
    assert first == Sampling() and second == Sampling(seed=3)


def test_a_run_goes_on_where_it_was_cut_short(bank, tmp_path):
    source = write(tmp_path / "in.jsonl", REQUESTS)
    whole = run(bank, source, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 3, len(lines)):
        output = tmp_path / f"{kept}.jsonl"
        output.write_bytes(b"".join(lines[:kept]) + (lines[kept][:-7] if kept < len(lines) else b""))
        assert run(bank, source, output) == whole


def test_messages_that_the_template_refuses_are_one_lines_error(bank, tmp_path):
    model = opened(bank)
    model.tokenizer.chat_template = (
        "{{ raise_exception('no system') if messages[0]['role'] == 'system' else 'say red' }}"
    )
    said = [{"role": role, "content": "say"} for role in ("system", "user")]
    source = write(tmp_path / "in.jsonl", [{"messages": said}, {"messages": said[1:]}])
    assert answer_file(model, read_lines(source), tmp_path / "out.jsonl", max_tokens=3, console=Console(quiet=True))
    found = {e["index"]: e for e in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert "no system" in found[0]["error"]["message"] and found[1]["tokens"]


def test_answers_to_other_requests_are_refused(bank, tmp_path):
    source, output = write(tmp_path / "in.jsonl", REQUESTS), tmp_path / "out.jsonl"
    run(bank, source, output)
    other = write(tmp_path / "other.jsonl", REQUESTS[::-1])
    with pytest.raises(FileFormatError, match="line 1: expected an answer to a request of this input"):
        answered(output, read_lines(other))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "line 2: prompt: expected it or messages"),
        ("{}", "line 2: prompt: expected it or messages"),
        ('{"prompt": 3}', "line 2: prompt"),
        ('{"prompt": "a", "temprature": 1}', "line 2: temprature"),
        ('{"prompt": "a", "n": 2}', "line 2: n"),
        ("[1]", "line 2: "),
    ],
)
def test_lines_that_are_no_requests(tmp_path, line, said):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match=said):
        read_lines(path)


@pytest.mark.slow
def test_killed_at_any_moment(bank, tmp_path):
    requests = [
        {"prompt": f"say {'red ' * (i % 5)}", "model": ["red", "green", "base"][i % 3], "max_tokens": 20}
        for i in range(60)
    ]
    source, output = write(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    code = (
        "from pathlib import Path; from tests.t2.server.test_batch import opened, answer_file, read_lines, Console;"
        "import sys;"
        "o = opened(Path(sys.argv[1])); slow = o.engine._pass;"
        "import time; o.engine._pass = lambda: (time.sleep(0.01), slow());"
        "print('ready', flush=True);"
        "answer_file(o, read_lines(Path(sys.argv[2])), Path(sys.argv[3]), max_tokens=8, console=Console(quiet=True))"
    )
    for moment in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(bank), str(source), str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        process.stdout.readline()
        time.sleep(0.03 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    found = run(bank, source, output)
    assert [entry["index"] for entry in found] == list(range(60))
    assert found == run(bank, source, tmp_path / "alone.jsonl")
