"""`t2 serve --engine vllm` with the real model and its shipped bank: experts, mixes, auto, files that change."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

import t2
from t2.adaptation.bank_folder import SHIPPED, load_bank_folder
from t2.adaptation.strategies import pass_one
from t2.demo.run import QUESTIONS
from t2.generation.prompts import encode
from t2.tasks.base import Problem, user_message

MODEL, TOKENS = "smollm2-135m-instruct", 16
QUESTION = "State the final answer to the following arithmetic problem: 12 + 30 - 7 ="


def ask(url, path, body, key="secret"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read()), dict(response.headers)


def chat(url, model, words=QUESTION, key="secret"):
    body = {"model": model, "messages": [user_message(words)], "max_tokens": TOKENS, "temperature": 0}
    found, headers = ask(url, "/v1/chat/completions", body, key)
    return found["choices"][0]["message"]["content"], headers, found["model"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    bank = folder / "bank"
    shutil.copytree(SHIPPED / MODEL, bank)
    (folder / "keys").write_text("secret\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t2", "serve", MODEL, "--engine", "vllm", "--bank", str(bank), "--port", str(port)]
    command += [
        "--factor-dtype",
        "float32",
        "--max-rows",
        "8",
        "--max-tokens",
        "512",
        "--api-keys",
        str(folder / "keys"),
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None, (folder / "log").read_text()[-4000:]
        yield url, bank, folder / "log"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def wrapped():
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    load_bank_folder(MODEL).add_to(svf)
    return svf, tokenizer


@pytest.fixture(scope="module")
def alone(wrapped):
    """The greedy answer of a merged model."""
    svf, tokenizer = wrapped

    def answer(choice, words=QUESTION):
        merged = svf.merged_copy(choice)
        prompt = encode(Problem((user_message(words),)), tokenizer)[None]
        out = merged.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
        return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)

    return answer


def test_answers_are_the_merged_models(server, alone, wrapped):
    url, _, _ = server
    svf, _ = wrapped
    mixed = svf.bank.mix({"sums": 0.7, "logic": 0.3})
    for name, choice in (("base", None), ("sums", "sums"), ("logic", "logic"), ("sums:0.7+logic:0.3", mixed)):
        assert chat(url, name)[0] == alone(choice), name


def test_auto_chooses_as_pass_one_does_and_says_so(server, alone, wrapped):
    url, _, _ = server
    svf, tokenizer = wrapped
    asked = [*QUESTIONS[:6], QUESTION]
    found = pass_one("classifier", svf, tokenizer, load_bank_folder(MODEL).domains).adapt(asked)
    chosen = [found.names[int(row.argmax())] for row in found.alpha]
    assert "sums" in chosen and "base" in chosen
    for words, name, reason in zip(asked, chosen, found.reasons, strict=True):
        text, headers, model = chat(url, "auto", words)
        assert headers["x-t2-expert"].replace("others", "base") == name
        assert headers["x-t2-reason"] == reason
        assert float(headers["x-t2-seconds"]) > 0
        assert model == (MODEL if name == "base" else name)
        assert text == alone(None if name == "base" else name, words)


@pytest.mark.parametrize("name", ["nobody", "../bank/sums", "sums:0.5+nobody:0.5", "sums:nan+logic:1"])
def test_unknown_names_are_refused(server, name):
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(server[0], name)
    assert refused.value.code in (400, 404)


def test_keys_count_for_auto_too(server):
    for name in ("sums", "auto"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            chat(server[0], name, key="wrong")
        assert refused.value.code == 401


def test_files_come_are_replaced_and_go(server, alone, wrapped):
    url, bank, _ = server
    svf, _ = wrapped
    shutil.copy(bank / "logic.safetensors", bank / "mine.safetensors")
    assert chat(url, "mine")[0] == alone("logic")
    other = t2.Expert(2 - svf.bank["logic"].z, svf.layout)
    other.save(bank / "mine.safetensors")
    assert chat(url, "mine")[0] == alone(other.z)
    (bank / "mine.safetensors").write_bytes(b"half a file")
    assert chat(url, "mine")[0] == alone(other.z)  # as it was
    (bank / "mine.safetensors").unlink()
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(url, "mine")
    assert refused.value.code == 404
