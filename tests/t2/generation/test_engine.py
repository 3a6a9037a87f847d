"""Continuous batching: whoever runs beside a request, whenever it joins, its answer is the one it has alone."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
)

import t2
from t2.generation.engine import Engine, Finished, QueueFull, Token
from t2.generation.sampling import Sampling
from tests.t2.toy import toy_model


class Answer:
    """What a request is given."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.end: Finished | None = None
        self.done = threading.Event()

    def __call__(self, event):
        assert self.end is None
        if isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.end = event
            self.done.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


@pytest.fixture
def svf():
    model = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    for i in range(4):
        model.add_expert(f"e{i}", t2.Expert.random(model.layout, seed=i, std=0.5))
    return model


def engine_of(svf, **options) -> Engine:
    return Engine(svf, **{"eos_ids": (2,), "max_rows": 3, "max_tokens": 60, "chunk": 5, **options})


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    common = [draw.randrange(3, 14) for _ in range(40)]
    return [
        common[: draw.choice((0, 0, 33, 40))] + [draw.randrange(3, 14) for _ in range(draw.randrange(1, 9))]
        for _ in range(count)
    ]


EXPERTS = [None, "e0", "e1", {"e0": 0.5, "e2": 0.5}, "e3"]


def alone(svf, prompt, expert, new_tokens) -> list[int]:
    out = svf.generate(
        torch.tensor([prompt]),
        experts=[expert],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_answers_are_those_of_generate_alone(svf, chunk):
    engine, draw, given = engine_of(svf, chunk=chunk), random.Random(1), []
    for i, prompt in enumerate(prompts(24)):
        expert, length = EXPERTS[i % len(EXPERTS)], draw.randrange(1, 12)
        answer = Answer()
        engine.submit(prompt, answer, max_tokens=length, expert=expert)
        given.append((prompt, expert, length, answer))
        for _ in range(draw.randrange(4)):
            engine.step()
    while engine.step():
        pass
    assert engine.running == engine.waiting == 0
    assert engine.prefixes.hits > 0
    for prompt, expert, length, answer in given:
        assert answer.ids == alone(svf, prompt, expert, length)
        assert answer.end == Finished("stop" if answer.ids[-1] == 2 else "length")
    assert svf.slot_table.in_use == 1 + 4  # mixes gave theirs back


def test_bits_do_not_depend_on_chunks_company_or_cached_beginnings():
    """Of a model on the attention kernel whose rows are whole vectors: torch rounds what is left of one otherwise."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=14, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, head_dim=16, **sizes)).eval()
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    svf.add_expert("e0", t2.Expert.random(svf.layout, std=0.5))
    prompt = [3 + i % 11 for i in range(45)]

    def log_p(company: int, **options) -> list[float]:
        engine, answer = engine_of(svf, **options), Answer()
        for i in range(company):
            engine.submit(prompt[: 33 + i], Answer(), max_tokens=9 - i, expert="e0", sampling=Sampling(1.0))
        while company and not all(request.is_read for request in engine._running or engine._waiting):
            engine.step()
        engine.submit(prompt, answer, max_tokens=12, expert="e0", likeliest=3)
        while engine.step():
            pass
        assert (engine.prefixes.hits > 0) == (company > 0 and "prefix_bytes" not in options)
        return [value for token in answer.tokens for value in (token.log_p, *(p for _, p in token.likeliest))]

    first = log_p(0)
    assert first == log_p(5) == log_p(2, chunk=1) == log_p(5, chunk=100, max_rows=9) == log_p(3, prefix_bytes=0)


def test_an_expert_that_is_replaced_finishes_its_answers(svf):
    engine, before, after = engine_of(svf), Answer(), Answer()
    prompt = prompts(1)[0]
    want = alone(svf, prompt, "e0", 10)
    engine.submit(prompt, before, max_tokens=10, expert="e0")
    engine.step()
    other = t2.Expert.random(svf.layout, seed=9, std=0.7)
    svf.add_expert("e0", other, replace=True)
    engine.submit(prompt, after, max_tokens=10, expert="e0")
    svf.remove_expert("e0")
    while engine.step():
        pass
    assert before.ids == want and after.ids == alone(svf, prompt, other, 10)
    with pytest.raises(ValueError, match="e0"):
        engine.submit(prompt, Answer(), max_tokens=10, expert="e0")


def test_draws_are_the_seeds_alone(svf):
    def drawn(company: int, seed: int, **sampling) -> list[int]:
        engine, answer = engine_of(svf), Answer()
        for prompt in prompts(company, seed=3):
            engine.submit(prompt, Answer(), max_tokens=6, sampling=Sampling(1.3, seed=company))
        engine.submit([5, 6], answer, max_tokens=12, sampling=Sampling(1.0, seed=seed, **sampling))
        while engine.step():
            pass
        return answer.ids

    assert drawn(0, 1) == drawn(4, 1) != drawn(0, 2)
    assert drawn(0, 1, top_p=1e-9) == drawn(2, 7, top_p=1e-9) == alone(svf, [5, 6], None, 12)


def test_log_probabilities(svf):
    engine, answer = engine_of(svf), Answer()
    engine.submit([4, 5, 6], answer, max_tokens=4, expert="e1", likeliest=14)
    while engine.step():
        pass
    with torch.no_grad():
        ids = torch.tensor([[4, 5, 6, *answer.ids]])
        want = svf(ids, experts="e1").logits[0, 2:-1].log_softmax(-1)
    for token, row in zip(answer.tokens, want, strict=True):
        assert token.log_p == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.likeliest] == row.sort(descending=True).indices.tolist()


def test_cancelled_requests_leave_at_once(svf):
    engine, answers = engine_of(svf, max_rows=2), [Answer() for _ in range(4)]
    requests = [engine.submit([5] * (3 + i), each, max_tokens=30) for i, each in enumerate(answers)]
    engine.step()
    for request in requests[::2]:
        request.cancel()
    while engine.step():
        pass
    assert [answer.end.reason for answer in answers[::2]] == ["cancelled"] * 2
    for i in (1, 3):
        assert answers[i].ids == alone(svf, [5] * (3 + i), None, 30)


def test_a_thread_of_its_own(svf):
    engine = engine_of(svf)
    thread = threading.Thread(target=engine.run)
    thread.start()
    answers = [Answer() for _ in range(12)]
    given = prompts(12, seed=8)
    for i, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
        engine.submit(prompt, answer, max_tokens=7, expert=EXPERTS[i % 5])
    engine.close(drain=True)
    thread.join()
    for i, (prompt, answer) in enumerate(zip(given, answers, strict=True)):
        assert answer.ids == alone(svf, prompt, EXPERTS[i % 5], 7)
    with pytest.raises(RuntimeError, match="has ended"):
        engine.submit([5], Answer(), max_tokens=1)


def test_a_failure_reaches_every_request(svf, monkeypatch):
    engine, answers = engine_of(svf), [Answer() for _ in range(5)]
    monkeypatch.setattr(engine, "_pass", lambda: 1 / 0)
    for answer in answers:
        engine.submit([5, 6], answer, max_tokens=7)
    threading.Thread(target=engine.run).start()
    for answer in answers:
        assert answer.done.wait(20)
        assert answer.end.reason == "error" and "ZeroDivisionError" in answer.end.error
    with pytest.raises(RuntimeError, match="has ended"):
        engine.submit([5], Answer(), max_tokens=1)
    assert svf.slot_table.in_use == 1 + 4


def test_what_is_refused(svf):
    engine = engine_of(svf, max_waiting=2)
    for prompt in ([], [14], [-1], ["a"]):
        with pytest.raises(ValueError, match="prompt: expected token ids from 0 to 13"):
            engine.submit(prompt, Answer(), max_tokens=1)
    with pytest.raises(ValueError, match="at most 60 tokens together, got 50 and 11"):
        engine.submit([5] * 50, Answer(), max_tokens=11)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(-1.0)
    with pytest.raises(ValueError, match="top_p"):
        Sampling(1.0, 0.0)
    engine.submit([5], Answer(), max_tokens=1)
    engine.submit([5], Answer(), max_tokens=1)
    with pytest.raises(QueueFull):
        engine.submit([5], Answer(), max_tokens=1)


def test_chosen_tokens_log_probabilities_and_who_goes_ahead(svf):
    engine, all_tokens, some = engine_of(svf, max_rows=1), Answer(), Answer()
    last = Answer()
    engine.submit([4, 5, 6], all_tokens, max_tokens=1, likeliest=14)
    engine.submit([7, 8], last, max_tokens=1)
    engine.submit([4, 5, 6], some, max_tokens=1, likeliest=(3, 9), ahead=True)
    engine.step()
    assert some.end is not None and last.end is None and all_tokens.end is None
    while engine.step():
        pass
    every = dict(all_tokens.tokens[0].likeliest)
    assert some.tokens[0].likeliest == ((3, every[3]), (9, every[9]))
    with pytest.raises(ValueError, match="likeliest: expected tokens from 0 to 13"):
        engine.submit([5], Answer(), max_tokens=1, likeliest=(14,))


def test_events_of_a_step_are_announced_once(svf):
    engine, announced = engine_of(svf, max_rows=4), []
    answers = [Answer() for _ in range(4)]
    engine.after_events = lambda: announced.append(sum(len(answer.tokens) for answer in answers))
    for i, answer in enumerate(answers):
        engine.submit([4 + i], answer, max_tokens=2)
    engine.step()
    assert announced == [4]
    while engine.step():
        pass
    assert len(announced) == 2 and announced[1] == sum(len(answer.tokens) for answer in answers)


def test_work_runs_beside_the_steps(svf):
    engine = engine_of(svf)
    threads = torch.get_num_threads()

    async def work(prompt: list[int]) -> list[int]:
        answer = Answer()
        engine.submit(prompt, answer, max_tokens=5, expert="e0")
        while answer.end is None:
            await asyncio.sleep(0.001)
        assert torch.get_num_threads() == 1
        return answer.ids

    for prompt in ([4, 5], [6]):  # twice: the engine goes on to be of use
        assert engine.alongside(work(prompt)) == alone(svf, prompt, "e0", 5)
    assert torch.get_num_threads() == threads

    async def failing() -> None:
        raise LookupError("not here")

    with pytest.raises(LookupError, match="not here"):
        engine.alongside(failing())


def test_an_interrupt_cancels_the_work_and_the_engine_goes_on(svf):
    engine, cancelled = engine_of(svf), []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        engine.alongside(work())
    assert cancelled and signal.getsignal(signal.SIGINT) is before
    assert engine.alongside(asyncio.sleep(0, "done")) == "done"


SIZES = dict(vocab_size=14, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
WINDOWS = {
    "one kind": MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES),
    "two kinds": Gemma3TextConfig(
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
    ),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_of_keys(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WINDOWS[kind]).eval()
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False))
    svf.add_expert("e0", t2.Expert.random(svf.layout, std=0.5))
    engine, given = engine_of(svf), []
    for i, prompt in enumerate(prompts(8)):
        given.append((prompt, (None, "e0")[i % 2], Answer()))
        engine.submit(prompt, given[-1][2], max_tokens=12, expert=given[-1][1])
    while engine.step():
        pass
    assert any(len(prompt) > 30 for prompt, _, _ in given)
    for prompt, expert, answer in given:
        assert answer.ids == alone(svf, prompt, expert, 12)


def test_models_that_the_engine_can_not_run_are_refused():
    state = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=14, hidden_size=32, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(TypeError, match="all keys and values, got MambaForCausalLM"):
        Engine(t2.SVFModel(state, t2.SVFConfig(progress=False)), eos_ids=(2,))
    eager = toy_model()
    eager.config._attn_implementation = "eager"
    with pytest.raises(TypeError, match="'sdpa', got 'eager'"):
        Engine(t2.SVFModel(eager, t2.SVFConfig(progress=False)), eos_ids=(2,))


def test_a_model_that_reads_single_tokens_otherwise_is_refused(monkeypatch):
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    run = svf.model.forward

    @functools.wraps(run)
    def forward(*args, position_ids=None, **kwargs):
        return run(*args, position_ids=None if position_ids is None else position_ids * 0, **kwargs)

    monkeypatch.setattr(svf.model, "forward", forward)
    with pytest.raises(TypeError, match="the same logits for tokens one by one and together, got others from Llama"):
        engine_of(svf)


def test_prompts_that_begin_alike_and_come_together_are_read_once(svf):
    engine = engine_of(svf, chunk=36)
    prompt, given = [3 + i % 11 for i in range(50)], [Answer() for _ in range(3)]
    for answer in given:
        engine.submit(prompt, answer, max_tokens=5, expert="e0")
    while engine.step():
        pass
    assert engine.prefixes.hits == 2 * 32
    assert [answer.ids for answer in given] == 3 * [alone(svf, prompt, "e0", 5)]
