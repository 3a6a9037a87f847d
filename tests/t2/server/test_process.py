"""`t2 serve` as a process: it says where it listens, and SIGTERM lets running answers end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.t2.toy import toy_model, toy_tokenizer


@pytest.fixture
def served(tmp_path):
    toy_model().save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t2", "serve", str(tmp_path / "toy"), "--port", str(port), "--no-compiled"]
    process = subprocess.Popen([*command, "--max-tokens", "1200"], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reading.start()
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except urllib.error.URLError:
            assert process.poll() is None and time.monotonic() < deadline, lines
            time.sleep(0.05)
    yield process, url, lines
    process.kill()
    process.wait()
    reading.join()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(served, kind):
    process, url, lines = served
    body = {
        "model": "toy",
        "prompt": [4, 5],
        "max_tokens": 1000,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"temperature": 1.0, "seed": 1, "n": 4}
    asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(asked, timeout=60) as reply:
        first = reply.readline()
        process.send_signal(kind)
        rest = reply.read().decode()
    assert first.startswith(b"data: ") and rest.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
    assert sum(choice["finish_reason"] is not None for event in events for choice in event["choices"]) == 4
    assert process.wait(30) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health", timeout=5)
    log = [json.loads(line) for line in lines if line.startswith("{")]
    assert log[0]["message"].startswith("answering on http://127.0.0.1:") and log[-1]["message"] == "request"


def test_a_port_that_is_taken_ends_the_process_with_an_error(served):
    _, url, _ = served
    port = url.rpartition(":")[2]
    model = served[0].args[4]
    command = [sys.executable, "-m", "t2", "serve", model, "--port", port, "--no-compiled"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0 and "address already in use" in ended.stderr
