"""A bank's experts as vLLM's adapters, and the middleware in front of vLLM. vLLM itself: tests/vllm."""

from __future__ import annotations

import asyncio
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import t2
from t2.experts import support
from t2.experts.layout import Layout
from t2.integrations.vllm import bank as banks
from t2.integrations.vllm.bank import ROWS, Bank, base_bits, set_support, split_exactly
from t2.integrations.vllm.bank_middleware import BankMiddleware

LAYOUT = Layout(("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"), (5, 7), "f" * 64, "tiny")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(banks.SUPPORT, raising=False)
    found = tmp_path / "bank"
    found.mkdir()
    for i, name in enumerate(("sums", "logic", "1.5")):
        t2.Expert.random(LAYOUT, std=0.03, seed=i).save(found / f"{name}.safetensors")
    t2.Expert.random(LAYOUT, seed=9).save(found / "classifier.safetensors")
    monkeypatch.setenv(banks.BANK, str(found))
    return found


def offsets(adapter):
    """z - 1 as vLLM's layers see it, whatever dtype adapters are cast to."""
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    rows = [tensors[f"base_model.model.{name}.lora_A.weight"].bfloat16().float() for name in LAYOUT.names]
    assert all(torch.equal(each[ROWS], base_bits(LAYOUT.fingerprint, each.shape[1])) for each in rows)
    return [each[:ROWS].sum(0) for each in rows]


def test_three_bfloat16_rows_hold_a_float32_exactly():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.03
    rows = split_exactly(values)
    assert torch.equal(rows.bfloat16().float(), rows)
    assert torch.equal(rows.sum(0), values)
    assert torch.equal(split_exactly(torch.zeros(3)), torch.zeros(3, 3))


def test_bits_tell_bases_apart_in_any_dtype():
    one, other = base_bits("a" * 64, 300), base_bits("b" * 64, 300)
    assert one.shape == (300,) and torch.equal(one.bfloat16().float(), one)
    assert torch.equal(one[256:], one[:44])
    assert 80 < int((one != other).sum()) < 220
    assert base_bits("a" * 64, 1).shape == (1,)


def test_a_process_makes_no_more_mixes_than_it_says(folder, monkeypatch):
    monkeypatch.setattr(banks, "MOST_MIXES", 2)
    bank = Bank(folder)
    for weight in (1, 2):
        assert bank.find(f"sums:{weight}") is not None
    with pytest.raises(ValueError, match="expected at most 2 different ones"):
        bank.find("sums:3")
    assert bank.find("sums:1") is not None and bank.find("logic") is not None


def test_an_adapter_is_z_minus_one_and_named_by_its_content(folder):
    bank = Bank(folder)
    assert bank.names == ["1.5", "logic", "sums"]
    found = bank.find("sums")
    z = t2.Expert.load(folder / "sums.safetensors").z
    for window, part in zip((slice(0, 5), slice(5, 12)), offsets(found), strict=True):
        assert torch.equal(part, z[window] - 1)
    assert bank.find("sums") is found
    assert found.number >= 1 << 62
    assert Bank(folder).find("sums") == found
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj"]
    (folder / "same.safetensors").write_bytes((folder / "sums.safetensors").read_bytes())
    assert bank.find("same").path == found.path


def test_a_replaced_file_is_another_adapter_and_a_removed_one_none(folder):
    bank = Bank(folder)
    before = bank.find("sums")
    mix = bank.find("sums:0.5+logic:0.5")
    t2.Expert.random(LAYOUT, std=0.03, seed=77).save(folder / "sums.safetensors")
    after = bank.find("sums")
    assert (before.path, before.number) != (after.path, after.number)
    assert bank.find("sums:0.5+logic:0.5").path != mix.path
    (folder / "sums.safetensors").unlink()
    assert bank.find("sums") is None
    assert bank.find("sums:0.5+logic:0.5") is None
    assert before.path.is_dir()  # answers that run end with it


def test_mixes_have_the_z_of_the_bank_and_may_name_the_base(folder):
    bank = Bank(folder)
    sums, logic = (t2.Expert.load(folder / f"{name}.safetensors") for name in ("sums", "logic"))
    mixed = torch.cat(offsets(bank.find("sums:0.7+logic:0.3"))) + 1
    torch.testing.assert_close(mixed, 0.7 * sums.z + 0.3 * logic.z)
    half = torch.cat(offsets(bank.find("sums:0.5+base:0.5"))) + 1
    torch.testing.assert_close(half, 0.5 * sums.z + 0.5)
    assert bank.find("sums:0.5+nobody:0.5") is None
    assert bank.find("base:1") is None


@pytest.mark.parametrize("name", ["../bank/sums", "/etc/passwd", "sums/../sums", ".", "..", "", "su\0ms", ".hidden"])
def test_names_cannot_leave_the_folder(folder, name):
    t2.Expert.random(LAYOUT).save(folder / ".hidden.safetensors")
    assert Bank(folder).find(name) is None
    assert Bank(folder).find(f"{name}:0.5+sums:0.5") is None


def test_a_damaged_file_is_an_error_that_names_it(folder):
    (folder / "sums.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"sums\.safetensors"):
        Bank(folder).find("sums")


def test_no_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="T2_BANK: expected a folder"):
        Bank(tmp_path / "none")
    monkeypatch.delenv(banks.BANK, raising=False)
    with pytest.raises(ValueError, match="T2_BANK"):
        Bank.from_environment()


def test_the_support_is_that_of_the_bank_at_the_start(folder, monkeypatch):
    for name, first in (("sums", 1), ("logic", 6), ("1.5", 1), ("classifier", 8)):
        z = torch.ones(12)
        z[first] = 1.1
        t2.Expert(z, LAYOUT).save(folder / f"{name}.safetensors")
    set_support()
    path = banks.os.environ[banks.SUPPORT]
    monkeypatch.setenv(banks.SUPPORT, path)  # so that it is undone
    assert support.load(path, LAYOUT).tolist() == [1, 6, 8]
    t2.Expert.random(LAYOUT).save(folder / "late.safetensors")
    set_support()
    assert banks.os.environ[banks.SUPPORT] == path


class FakeVLLM:
    """An application like vLLM's: it says what it was asked, and has its registry of adapters."""

    def __init__(self, bank):
        self.bodies, self.status = [], 200
        self.bank, self.loads = bank, []
        served = SimpleNamespace(
            lora_requests={},
            base_model_paths=[SimpleNamespace(name="tiny")],
            is_base_model=lambda name: name == "tiny",
            resolve_lora=self.resolve,
        )
        self.state = SimpleNamespace(openai_serving_models=served, engine_client=None)
        self.served = served

    async def resolve(self, name):
        self.loads.append(name)
        if name == "1.5":
            return SimpleNamespace(error=SimpleNamespace(message="beside the support"))
        found = self.served.lora_requests[name] = SimpleNamespace(lora_path=str(self.bank.find(name).path))
        return found

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        self.bodies.append((scope["method"], scope["path"], message["body"]))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})


def post(middleware, app, body, path="/v1/chat/completions"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(content) // 2
    pieces = [(content[:half], True), (content[half:], False)]
    sent = []

    async def receive():
        if not pieces:
            return {"type": "http.disconnect"}
        part, more = pieces.pop(0)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "app": app,
        "headers": [(b"content-length", str(len(content)).encode())],
    }
    asyncio.run(middleware(scope, receive, send))
    return sent


def test_adapters_that_nothing_has_used_for_long_are_deleted(folder):
    bank, long_ago = Bank(folder), time.time() - 61 * 86400
    old = [bank.find(name).path for name in ("sums", "sums:0.5+base:0.5")]
    for path in old:
        os.utime(path, (long_ago, long_ago))
    assert Bank(folder).find("sums").path == old[0]  # used again
    new = Bank(folder).find("sums:0.25+base:0.75").path
    assert new.is_dir() and old[0].is_dir() and not old[1].exists()
    assert bank.find("sums:0.5+base:0.5").path.is_dir()  # made again where it is wanted


@pytest.fixture
def app(folder):
    return FakeVLLM(Bank(folder))


@pytest.mark.parametrize("body", [{"model": "tiny"}, {"model": 3}, {}, [], b"{", b"", b"[" * 100_000, {"model": "x"}])
def test_other_requests_pass_as_they_are(app, body):
    sent = post(BankMiddleware(app), app, body)
    assert app.bodies == [
        ("POST", "/v1/chat/completions", body if isinstance(body, bytes) else json.dumps(body).encode())
    ]
    assert sent[0]["status"] == 200
    assert app.loads == []


def test_a_name_is_looked_up_again_when_its_file_has_changed(app, folder):
    middleware = BankMiddleware(app)
    for _ in range(2):
        post(middleware, app, {"model": "sums"})
    assert app.loads == ["sums"]
    t2.Expert.random(LAYOUT, seed=5).save(folder / "sums.safetensors")
    for _ in range(2):
        post(middleware, app, {"model": "sums"})
    assert app.loads == ["sums", "sums"]
    (folder / "sums.safetensors").write_bytes(b"half a file")
    assert post(middleware, app, {"model": "sums"})[0]["status"] == 200  # damaged: the expert stays as it was
    assert "sums" in app.served.lora_requests
    (folder / "sums.safetensors").unlink()
    post(middleware, app, {"model": "sums"})
    assert "sums" not in app.served.lora_requests


def test_what_cannot_be_loaded_is_said(app, folder):
    middleware = BankMiddleware(app)
    sent = post(middleware, app, {"model": "1.5"})
    assert sent[0]["status"] == 400
    assert "beside the support" in json.loads(sent[1]["body"])["error"]["message"]
    (folder / "logic.safetensors").write_bytes(b"half a file")
    sent = post(middleware, app, {"model": "logic"})
    assert sent[0]["status"] == 400
    assert "logic.safetensors" in json.loads(sent[1]["body"])["error"]["message"]


def test_nothing_is_loaded_for_clients_that_vllm_refuses(app):
    app.status = 401
    sent = post(BankMiddleware(app), app, {"model": "sums"})
    assert sent[0]["status"] == 401
    assert app.loads == []


def test_auto_asks_pass_one_and_says_whom_it_chose(app, monkeypatch):
    middleware = BankMiddleware(app)

    async def choose(body, state):
        return "logic", "logic 90%, sums 10%", 0.25

    monkeypatch.setattr(middleware, "_choose", choose)
    sent = post(middleware, app, {"model": "auto", "messages": [{"role": "user", "content": "ä?"}]})
    assert json.loads(app.bodies[-1][2])["model"] == "logic"
    headers = dict(sent[0]["headers"])
    assert headers[b"x-t2-expert"] == b"logic"
    assert headers[b"x-t2-reason"] == b"logic 90%, sums 10%"


def test_auto_costs_nothing_for_clients_that_vllm_refuses(app, monkeypatch):
    app.status = 401
    middleware = BankMiddleware(app)
    monkeypatch.setattr(middleware, "_choose", None)
    sent = post(middleware, app, {"model": "auto", "prompt": "x"})
    assert [method for method, _, _ in app.bodies] == ["GET"]
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("body", [{"model": "auto"}, {"model": "auto", "messages": [{"role": "user", "content": 3}]}])
def test_auto_without_words_is_the_clients_mistake(app, body):
    sent = post(BankMiddleware(app), app, body)
    assert sent[0]["status"] == 400
    assert "no automatic choice" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_body_that_is_too_large_is_refused(app, monkeypatch):
    monkeypatch.setattr("t2.integrations.vllm.bank_middleware.MOST", 10)
    sent = post(BankMiddleware(app), app, {"model": "sums", "prompt": "x" * 100})
    assert sent[0]["status"] == 413
    assert app.bodies == []
