"""What is no client's business, or a hostile one's: files that come and go, limits, metrics, broken requests."""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

import t2


def ask(
    url: str, path: str, body: bytes | dict | None = None, method: str | None = None, **headers
) -> tuple[int, bytes]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(
        url + path, data, {k.replace("_", "-"): v for k, v in headers.items()}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def text_of(url: str, model: str) -> str:
    status, reply = ask(
        url, "/v1/completions", {"model": model, "prompt": "say red", "temperature": 0, "max_tokens": 12}
    )
    assert status == 200, reply
    return json.loads(reply)["choices"][0]["text"]


def expert_bytes(running, tmp_path, seed: int) -> bytes:
    path = tmp_path / f"{seed}.safetensors"
    t2.Expert.random(running.server.experts.svf.layout, seed=seed, std=0.7).save(path)
    return path.read_bytes()


def wait_for(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_experts_come_change_and_go_with_their_files(serving, bank, tmp_path):
    running = serving()
    models = lambda: [m["id"] for m in json.loads(ask(running.url, "/v1/models")[1])["data"]]  # noqa: E731
    (bank / "new.safetensors").write_bytes(expert_bytes(running, tmp_path, 5))
    wait_for(lambda: "new" in models())
    before = text_of(running.url, "new")
    (bank / "new.safetensors").write_bytes(expert_bytes(running, tmp_path, 6))
    wait_for(lambda: text_of(running.url, "new") != before)
    (bank / "new.safetensors").write_bytes(b"no expert")
    (bank / "bad.safetensors").write_bytes(b"no expert")
    time.sleep(1.5)
    assert "new" in models() and "bad" not in models()
    (bank / "new.safetensors").unlink()
    wait_for(lambda: "new" not in models())
    assert ask(running.url, "/v1/completions", {"model": "new", "prompt": "say"})[0] == 404


def test_experts_over_http_need_the_admin_key(serving, bank, tmp_path):
    running = serving(admin_key="root", api_keys=("user",))
    content = expert_bytes(running, tmp_path, 7)
    for headers in ({}, {"Authorization": "Bearer user"}):
        assert ask(running.url, "/v1/experts/e9", content, "PUT", **headers)[0] == 401
    root = {"Authorization": "Bearer root"}
    for name in ("..%2Fe9", ".e9", "a%2Fb", "%00", "x" * 200):
        assert ask(running.url, f"/v1/experts/{name}", content, "PUT", **root)[0] in (400, 404)
    assert sorted(path.name for path in bank.parent.iterdir()) == ["7.safetensors", "bank"]
    assert ask(running.url, "/v1/experts/e9", b"junk", "PUT", **root)[0] == 400
    assert not (bank / "e9.safetensors").exists()
    assert ask(running.url, "/v1/experts/e9", content, "PUT", **root)[0] == 200
    assert "e9" in running.server.experts.names and (bank / "e9.safetensors").is_file()
    assert ask(running.url, "/v1/experts/e9", None, "DELETE", **root)[0] == 200
    assert "e9" not in running.server.experts.names
    assert ask(running.url, "/v1/experts/e9", None, "DELETE", **root)[0] == 404


def test_names_that_nobody_could_ask_for_are_refused(serving, bank, tmp_path):
    running = serving(admin_key="root", max_body=2000)
    content = expert_bytes(running, tmp_path, 7)
    root = {"Authorization": "Bearer root"}
    for name in ("toy", "base", "auto"):
        assert ask(running.url, f"/v1/experts/{name}", content, "PUT", **root)[0] == 400
        assert not (bank / f"{name}.safetensors").exists()
    assert len(content) > 2000  # the limit is of requests: an expert may be as large as the model's are
    assert ask(running.url, "/v1/experts/large", content, "PUT", **root)[0] == 200


def test_auto_is_there_while_experts_are_replaced(serving, bank, tmp_path, monkeypatch):
    running = serving()
    experts, seen = running.server.experts, []
    of = experts._strategy_of
    monkeypatch.setattr(experts, "_strategy_of", lambda folder: (seen.append("auto" in experts.names), of(folder))[1])
    (bank / "red.safetensors").write_bytes(expert_bytes(running, tmp_path, 5))
    wait_for(lambda: seen)
    assert all(seen) and "auto" in experts.names


def test_pass_one_is_made_anew_when_its_experts_change_and_only_then(serving, bank, tmp_path, monkeypatch):
    running = serving()
    experts, made = running.server.experts, []
    of = experts._strategy_of
    monkeypatch.setattr(experts, "_strategy_of", lambda folder: (made.append(1), of(folder))[1])
    (bank / "other.safetensors").write_bytes(expert_bytes(running, tmp_path, 5))
    experts.look()
    assert "other" in experts.names and not made
    (bank / "domains.json").rename(bank / "aside.json")
    experts.look()
    assert len(made) == 1 and "auto" not in experts.names
    (bank / "aside.json").rename(bank / "domains.json")
    (bank / "red.safetensors").unlink()
    experts.look()
    assert len(made) == 2 and "auto" not in experts.names
    (bank / "red.safetensors").write_bytes(expert_bytes(running, tmp_path, 6))
    experts.look()
    assert len(made) == 3 and "auto" in experts.names


def test_pass_one_in_the_batch_chooses_as_it_does_alone(serving, monkeypatch):
    """As a request where the labels' first tokens differ, by a call between steps where they do not."""
    running = serving()
    experts = running.server.experts
    strategy = experts._strategy
    asked = "say red", "say green two", "say one"
    strategy.prior = strategy.label_scores(asked).mean(0)  # no flat one, so that words decide
    expected = strategy.adapt(asked)
    called = []
    call = running.engine.call
    monkeypatch.setattr(running.engine, "call", lambda work: (called.append(1), call(work))[1])
    for together in (True, False):
        if not together:
            monkeypatch.setattr(type(strategy.label_tokens), "first", None)
        for words, reason, row in zip(asked, expected.reasons, expected.alpha, strict=True):
            body = {"model": "auto", "prompt": words, "max_tokens": 2}
            status, reply = ask(running.url, "/v1/completions", body)
            found = json.loads(reply)["t2"]
            assert status == 200 and found["reason"] == reason
            assert found["expert"] == expected.names[int(row.argmax())]
    assert len(called) == 3


def test_who_waits_for_pass_one_hears_that_the_engine_failed(serving, monkeypatch):
    running = serving(eos_ids=())
    monkeypatch.setattr(running.engine, "_drop_cancelled", lambda: 1 / 0)  # before calls are made again
    call = running.engine.call
    monkeypatch.setattr(running.engine, "call", lambda work: call(lambda: 1 / 0))
    status, _ = ask(running.url, "/v1/completions", {"model": "auto", "prompt": "say red"})
    assert status == 503


def test_without_an_admin_key_nobody_changes_experts(serving, tmp_path):
    running = serving()
    assert ask(running.url, "/v1/experts/e9", expert_bytes(running, tmp_path, 7), "PUT")[0] == 403
    assert ask(running.url, "/v1/experts/red", None, "DELETE")[0] == 403


def test_health_metrics_and_the_page(serving):
    running = serving()
    text_of(running.url, "red")
    assert json.loads(ask(running.url, "/health")[1]) == {"status": "ok", "running": 0, "waiting": 0}
    metrics = ask(running.url, "/metrics")[1].decode()
    assert 't2_requests_total{expert="red",status="200"} 1.0' in metrics
    assert "t2_time_to_first_token_seconds_count 1.0" in metrics
    page = ask(running.url, "/")[1].decode()
    assert "<title>t2 serve</title>" in page and "://" not in page
    assert ask(running.url, "/nowhere")[0] == 404 and ask(running.url, "/health", b"x", "POST")[0] == 405


def test_a_failed_engine_is_told(serving, monkeypatch):
    running = serving(eos_ids=())
    monkeypatch.setattr(running.engine, "_pass", lambda: 1 / 0)
    status, reply = ask(running.url, "/v1/completions", {"model": "red", "prompt": "say red"})
    assert status == 500 and "ZeroDivisionError" in json.loads(reply)["error"]["message"]
    assert ask(running.url, "/health")[0] == 503
    assert ask(running.url, "/v1/completions", {"model": "red", "prompt": "say red"})[0] == 503


def test_answers_that_take_too_long(serving, monkeypatch):
    running = serving(answer_seconds=0.3, eos_ids=())
    slow = running.engine._pass
    monkeypatch.setattr(running.engine, "_pass", lambda: (time.sleep(0.1), slow()))
    status, reply = ask(running.url, "/v1/completions", {"model": "red", "prompt": "say red", "max_tokens": 50})
    assert status == 504 and json.loads(reply)["error"]["code"] == "timeout"
    wait_for(lambda: running.engine.running == 0)


GOOD = {"model": "red", "prompt": "say red", "max_tokens": 2}


def hostile(draw: random.Random) -> bytes:
    """A body that is nothing like a request, or nearly one."""
    return draw.choice(
        [
            lambda: bytes(draw.randrange(256) for _ in range(draw.randrange(400))),
            lambda: b"[" * draw.randrange(1, 100_000),
            lambda: b'{"a":' * 5000,
            lambda: json.dumps(GOOD).encode()[: draw.randrange(1, 40)],
            lambda: json.dumps(
                GOOD
                | {draw.choice([*GOOD, "n", "stop", "seed"]): draw.choice([None, {}, [[]], -1, 1e400, "\ud800", True])}
            ).encode(),
            lambda: json.dumps(GOOD | {"prompt": "say " * 40_000}).encode(),
            lambda: json.dumps(GOOD | {"n": 10**30}).encode(),
            lambda: json.dumps(
                GOOD | {"model": draw.choice(["../red", "red\0", "red:1+", "+", ":", "red:nan", "a" * 600, "red:1e5"])}
            ).encode(),
            lambda: json.dumps(GOOD | {"stop": ["x"] * 1000}).encode(),
            lambda: json.dumps({"model": "red", "messages": [{"role": "tool", "content": "x"}]}).encode(),
        ]
    )()


def test_hostile_bodies_get_a_clear_refusal(serving):
    running, draw = serving(max_body=100_000), random.Random(0)
    for i in range(150):
        path = draw.choice(["/v1/completions", "/v1/chat/completions"])
        status, reply = ask(running.url, path, hostile(draw))
        assert status == 200 or (400 <= status < 500 and json.loads(reply)["error"]["message"]), (i, status, reply)
    assert text_of(running.url, "red") and running.engine.running == 0


def test_slow_and_half_open_clients_disturb_nobody(serving):
    running = serving(body_seconds=0.5)
    host, port = running.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    sent = [
        b"",
        b"POST /v1/comp",
        head,
        head + b"Content-Length: 50\r\n\r\n{",
        head + b"Content-Length: nonsense\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 20,
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
    ]
    clients = []
    for part in sent:
        client = socket.create_connection((host, int(port)), timeout=10)
        with suppress(OSError):  # closed already
            client.sendall(part)
        clients.append(client)
    assert text_of(running.url, "red")
    assert b"408" in clients[3].recv(1000)
    for client in clients:
        client.close()
    assert text_of(running.url, "green") and ask(running.url, "/health")[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_addresses_that_others_reach_need_keys(host):
    import torch

    from t2.server.app import ServerOptions
    from t2.server.run import serve

    with pytest.raises(ValueError, match="expected a key in --api-keys"):
        serve(
            "smollm2-135m-instruct",
            bank=None,
            host=host,
            port=0,
            options=ServerOptions(),
            dtype=torch.float32,
            form="factored",
            support=None,
            max_rows=1,
            max_tokens=1,
            max_waiting=1,
            max_connections=1,
        )
