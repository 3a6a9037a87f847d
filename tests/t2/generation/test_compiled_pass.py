"""Passes that run as a compiled program give the bits of the model, and nothing else is used."""

from __future__ import annotations

import os
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2
from t2.generation import compiled_pass
from t2.generation.compiled_pass import Compilation, PassModule, program_key
from t2.generation.engine import Engine, Token
from t2.generation.sampling import Sampling
from tests.t2.generation.test_engine import Answer, prompts


def svf_of(form: str = "delta") -> t2.SVFModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=14, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, head_dim=16, **sizes)).to(torch.bfloat16).eval()
    options = {"form": "delta", "support": 8} if form == "delta" else {}
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.int8, cache=False, progress=False, slots=4, **options))
    return svf


def engine_of(svf: t2.SVFModel, **options) -> Engine:
    return Engine(svf, **{"eos_ids": (2,), "max_rows": 3, "max_tokens": 64, "chunk": 5, **options})


def expert_of(svf: t2.SVFModel, seed: int) -> t2.Expert:
    expert = t2.Expert.random(svf.layout, seed=seed, std=0.5)
    if svf.support is not None:
        z = torch.ones_like(expert.z)
        z[svf.support] = expert.z[svf.support]
        expert = t2.Expert(z, svf.layout)
    return expert


def compiled(engine: Engine) -> list[str]:
    news: list[str] = []
    with Compilation(engine, news.append) as compilation:
        compilation.finish()
    return news


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """One folder for all tests: the first one compiles."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(programs, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(programs))
    return programs


@pytest.mark.parametrize("form", ["delta", pytest.param("factored", marks=pytest.mark.slow)])
def test_answers_have_the_bits_of_the_model(cache, form):
    svf = svf_of(form)
    svf.add_expert("e0", expert_of(svf, 0))
    engine = engine_of(svf)
    assert compiled(engine) == ["passes run compiled"]
    assert {path.suffix for path in (cache / "passes").iterdir()} == {".pt2", ".so"}
    for i in range(1, 6):  # the slot table moves
        svf.add_expert(f"e{i}", expert_of(svf, i))
    assert engine.compiled is not None and svf.table_generation > 0

    def answers() -> list[tuple[Token, ...]]:
        given = [Answer() for _ in range(12)]
        for i, (prompt, answer) in enumerate(zip(prompts(12), given, strict=True)):
            expert = (None, "e0", "e5", {"e1": 0.5, "e2": 0.5})[i % 4]
            engine.submit(prompt, answer, max_tokens=8, expert=expert, sampling=Sampling(seed=i), likeliest=3)
        while engine.step():
            pass
        return [tuple(answer.tokens) for answer in given]

    compiled_answers, engine.compiled = answers(), None
    assert compiled_answers == answers()


def test_a_program_is_found_again(cache, monkeypatch):
    engine = engine_of(svf_of())
    compiled(engine)
    monkeypatch.setattr(Compilation, "_compile", None)
    again = engine_of(svf_of())
    assert compiled(again) == ["passes run compiled"]


def test_a_program_with_other_bits_is_not_used(cache, monkeypatch):
    run = compiled_pass.CompiledPass.__call__
    monkeypatch.setattr(compiled_pass.CompiledPass, "__call__", lambda *args: run(*args) * 1.01)
    engine = engine_of(svf_of())
    (news,) = compiled(engine)
    assert "not compiled: RuntimeError: the program gives other bits than the model for 1 tokens" in news
    assert engine.compiled is None


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    engine = engine_of(svf_of())
    (news,) = compiled(engine)
    assert news.startswith("passes are not compiled: RuntimeError: the compiler failed: ")
    assert engine.compiled is None and not list((tmp_path / "passes").iterdir())
    answer = Answer()
    engine.submit([3, 4], answer, max_tokens=3)
    while engine.step():
        pass
    assert len(answer.ids) == 3


def test_programs_that_nobody_loads_go_and_those_that_are_loaded_stay(cache, tmp_path, monkeypatch):
    long_ago = time.time() - 61 * 86400
    engine = engine_of(svf_of())
    compiled(engine)
    files = list((cache / "passes").iterdir())
    for file in files:
        os.utime(file, (long_ago, long_ago))
    compiled(engine_of(svf_of()))
    assert all(time.time() - file.stat().st_mtime < 86400 for file in files)
    for name in ("old.pt2", "runner-old.so", "old.txt", "new.pt2"):
        (cache / "passes" / name).write_bytes(b"")
        if "new" not in name:
            os.utime(cache / "passes" / name, (long_ago, long_ago))
    for file in files:
        file.unlink()
    compiled(engine_of(svf_of()))  # written anew
    left = {path.name for path in (cache / "passes").iterdir()}
    assert {"new.pt2", "old.txt"} <= left and not left & {"old.pt2", "runner-old.so"}


def test_programs_differ_by_what_they_depend_on():
    def key(svf, **options):
        engine = engine_of(svf, **options)
        return program_key(PassModule(engine.svf, engine.cache))

    assert key(svf_of()) == key(svf_of())
    many = svf_of()
    for i in range(9):  # more than the table had slots for
        many.add_expert(f"e{i}", expert_of(many, i))
    assert key(many) == key(svf_of())
    assert len({key(svf_of()), key(svf_of("factored")), key(svf_of(), max_tokens=128), key(svf_of(), max_rows=4)}) == 4
