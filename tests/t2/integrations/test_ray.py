"""Replicas behind Ray Serve: experts that reach all of them, one that is killed, and rows of a dataset."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import t2
from t2.generation.prompts import encode
from t2.integrations import ray as t2_ray
from t2.integrations.ray import AnswerRequests, BankKeeper
from t2.tasks.base import Problem, user_message
from tests.t2.toy import toy_model, toy_tokenizer

TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder, a bank, and the model itself."""
    folder = tmp_path_factory.mktemp("ray")
    os.environ["T2_CACHE"] = str(folder / "cache")
    toy_model().save_pretrained(folder / "toy")
    toy_tokenizer().save_pretrained(folder / "toy")
    svf, tokenizer = t2.load_svf(folder / "toy", t2.SVFConfig(progress=False))
    (folder / "bank").mkdir()
    for i in range(3):
        expert = t2.Expert.random(svf.layout, std=0.5, seed=i)
        expert.save(folder / "bank" / f"e{i}.safetensors")
        svf.add_expert(f"e{i}", expert)
    yield folder, svf, tokenizer
    del os.environ["T2_CACHE"]


def alone(base, expert, words):
    _, svf, tokenizer = base
    prompt = encode(Problem((user_message(words),)), tokenizer)[None]
    out = svf.generate(prompt, experts=[expert], max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


# The keeper


def test_the_keeper_says_what_has_changed(tmp_path):
    keeper = BankKeeper(str(tmp_path))
    assert keeper.changed({}) == ({}, [])
    keeper.put("a.safetensors", b"one")
    (tmp_path / "domains.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("no")
    new, gone = keeper.changed({})
    assert {name: content for name, (_, content) in new.items()} == {"a.safetensors": b"one", "domains.json": b"{}"}
    assert gone == []
    known = {name: stamp for name, (stamp, _) in new.items()}
    assert keeper.changed(known) == ({}, [])
    keeper.put("a.safetensors", b"other")
    assert keeper.changed(known)[0]["a.safetensors"][1] == b"other"
    keeper.delete("a.safetensors")
    keeper.delete("a.safetensors")
    assert keeper.changed(known)[1] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", ".a.safetensors", "a.txt", "b/a.safetensors"])
def test_the_keeper_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="name: expected"):
        BankKeeper(str(tmp_path)).put(name, b"")


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "host: expected a key"),
        ({"replicas": 0}, "replicas: expected"),
        ({"replicas": 3, "max_replicas": 2}, "replicas: expected"),
        ({"bank": "nowhere"}, "bank: expected a folder"),
    ],
)
def test_arguments_are_checked_before_a_cluster_starts(options, message):
    from t2.server.app import ServerOptions

    given = {"bank": None, "host": "127.0.0.1", "port": 1, "options": ServerOptions(), "replicas": 1} | options
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        t2_ray.serve("toy", **given)


# Rows of a dataset


def test_rows_of_a_dataset_are_answered(base):
    folder, _, _ = base
    answers = AnswerRequests(str(folder / "toy"), str(folder / "bank"), TOKENS, dtype="float32")
    batch = {"prompt": ["1 + 2", "2 + 2", "x"], "model": ["e0", "base", "nobody"], "id": torch.arange(3).numpy()}
    found = answers(batch)
    assert found["text"][:2] == [alone(base, "e0", "1 + 2"), alone(base, None, "2 + 2")]
    assert found["expert"][:2] == ["e0", "base"]
    assert found["error"][:2] == [None, None]
    assert "nobody" in found["error"][2]["message"]
    assert found["id"] == [0, 1, 2]


# Replicas


@pytest.fixture(scope="module")
def cluster(base):
    folder, _, _ = base
    (folder / "admin").write_text("boss\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t2", "serve", str(folder / "toy"), "--engine", "ray", "--replicas", "2"]
    command += ["--bank", str(folder / "bank"), "--port", str(port), "--factor-dtype", "float32", "--no-compiled"]
    command += ["--max-tokens", "64", "--admin-key", str(folder / "admin")]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if b"answering on" in (folder / "log").read_bytes() or process.poll() is not None:
                break
            time.sleep(0.5)
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        yield url
    finally:
        process.terminate()
        process.wait(90)


def call(url, path, body=None, method=None, key=None):
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}{path}", content, headers, method=method), timeout=60
    ) as r:
        return json.loads(r.read())


def chat(url, model, words):
    body = {"model": model, "messages": [user_message(words)], "max_tokens": TOKENS, "temperature": 0}
    return call(url, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def replica_processes():
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if file.read().startswith(b"ray::ServeReplica"):
                        found.append(int(name))
            except OSError:
                pass
    return found


def until(check, seconds=60):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.25)


def test_answers_are_right_and_experts_reach_all_replicas(cluster, base):
    folder, svf, _ = base
    asked = [(f"e{i % 3}" if i % 4 else "base", f"{i} + {i % 5}") for i in range(40)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: chat(cluster, *each), asked))
    assert found == [alone(base, None if name == "base" else name, words) for name, words in asked]

    new = t2.Expert.random(svf.layout, std=0.5, seed=50)
    new.save(folder / "new.safetensors")
    call(cluster, "/v1/experts/late", (folder / "new.safetensors").read_bytes(), "PUT", "boss")
    svf.add_expert("late", new)
    assert (folder / "bank" / "late.safetensors").is_file()

    def everywhere():
        with ThreadPoolExecutor(8) as pool:
            try:
                return set(pool.map(lambda _: chat(cluster, "late", "3 + 4"), range(24))) == {
                    alone(base, "late", "3 + 4")
                }
            except urllib.error.HTTPError as error:
                assert error.code == 404
                return False

    until(everywhere)
    call(cluster, "/v1/experts/late", None, "DELETE", "boss")
    assert not (folder / "bank" / "late.safetensors").exists()
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(cluster, "/v1/experts/late", b"x", "PUT", "guest")
    assert refused.value.code == 401


def test_a_killed_replica_is_replaced_and_the_other_goes_on(cluster, base):
    before = replica_processes()
    assert len(before) == 2
    wrong, failed = [], []

    def one(i):
        try:
            found = chat(cluster, "e1", f"{i} + 1")
        except (urllib.error.HTTPError, OSError) as error:
            failed.append(error)
            return
        if found != alone(base, "e1", f"{i} + 1"):
            wrong.append(i)

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(one, i) for i in range(20)]
        os.kill(before[0], signal.SIGKILL)
        running += [pool.submit(one, i) for i in range(100, 120)]
        for each in running:
            each.result()
    assert wrong == []
    assert len(failed) <= 8  # those in flight
    until(lambda: len(replica_processes()) == 2 and before[0] not in replica_processes(), 90)
    assert chat(cluster, "e1", "5 + 1") == alone(base, "e1", "5 + 1")
