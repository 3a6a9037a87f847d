"""What the official client asks, and what it gets."""

from __future__ import annotations

import time

import openai
import pytest
import torch

import t2
from tests.t2.toy import toy_model, toy_tokenizer

WORDS = "say red green blue one two"


@pytest.fixture
def client(serving):
    running = serving(api_keys=("secret",))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0) as made:
        made.running = running
        yield made


def alone(running, prompt: str, expert, new_tokens: int) -> str:
    """The answer of `generate`, in words."""
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    for name in running.server.experts.svf.bank:
        svf.add_expert(name, running.server.experts.svf.bank[name])
    tokenizer = toy_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = svf.generate(
        ids, experts=[expert], max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def complete(client, model: str, **options):
    return client.completions.create(model=model, prompt=WORDS, **{"max_tokens": 8, "temperature": 0, **options})


def test_models(client):
    assert [model.id for model in client.models.list()] == ["toy", "auto", "red", "green"]
    assert client.models.retrieve("green").id == "green"
    with pytest.raises(openai.NotFoundError, match="e7"):
        client.models.retrieve("e7")


@pytest.mark.parametrize(
    ("model", "expert"),
    [("toy", None), ("base", None), ("red", "red"), ("red:0.25+green:0.75", {"red": 0.25, "green": 0.75})],
)
def test_completions_are_those_of_generate(client, model, expert):
    found = complete(client, model)
    want = alone(client.running, WORDS, expert, 8)
    assert found.choices[0].text == want and found.object == "text_completion" and found.model == model
    assert found.usage.prompt_tokens == 6 and found.usage.total_tokens == 6 + found.usage.completion_tokens
    streamed = list(complete(client, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in streamed[:-1]) == want
    assert streamed[-1].usage.completion_tokens == found.usage.completion_tokens
    assert streamed[-2].choices[0].finish_reason == found.choices[0].finish_reason in ("stop", "length")


def test_a_mix_with_the_base(client):
    svf = client.running.server.experts.svf
    z = 0.5 * torch.ones(svf.layout.R) + 0.5 * svf.bank["green"].z
    assert complete(client, "toy:0.5+green:0.5").choices[0].text == alone(
        client.running, WORDS, t2.Expert(z, svf.layout), 8
    )


def test_chat(client):
    messages = [{"role": "system", "content": "say"}, {"role": "user", "content": [{"type": "text", "text": WORDS}]}]
    found = client.chat.completions.create(model="green", messages=messages, temperature=0, max_completion_tokens=8)
    message = found.choices[0].message
    assert message.role == "assistant" and isinstance(message.content, str) and found.id.startswith("chatcmpl-")
    streamed = list(
        client.chat.completions.create(model="green", messages=messages, temperature=0, max_tokens=8, stream=True)
    )
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == message.content
    assert streamed[-1].choices[0].finish_reason == found.choices[0].finish_reason


def test_auto_says_whom_it_chose_and_why(client):
    messages = [{"role": "user", "content": WORDS}]
    found = client.chat.completions.create(model="auto", messages=messages, temperature=0, max_tokens=4)
    about = found.model_extra["t2"]
    assert about["expert"] in ("base", "red", "green") and about["reason"] and about["first_pass_seconds"] > 0
    again = client.chat.completions.create(model=about["expert"], messages=messages, temperature=0, max_tokens=4)
    assert again.choices[0].message.content == found.choices[0].message.content


def test_several_answers_with_a_seed(client):
    def texts(seed: int) -> list[str]:
        found = complete(client, "red", n=4, seed=seed, temperature=1.5, max_tokens=12)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        return [choice.text for choice in found.choices]

    assert texts(1) == texts(1) != texts(5)
    assert len(set(texts(1))) > 1
    streamed: dict[int, str] = {}
    for event in complete(client, "red", n=4, seed=1, temperature=1.5, max_tokens=12, stream=True):
        streamed[event.choices[0].index] = streamed.get(event.choices[0].index, "") + event.choices[0].text
    assert [streamed[i] for i in range(4)] == texts(1)


def test_several_prompts_and_token_ids(client):
    found = client.completions.create(model="red", prompt=[WORDS, "say red"], temperature=0, max_tokens=5)
    assert [c.text for c in found.choices] == [alone(client.running, words, "red", 5) for words in (WORDS, "say red")]
    ids = toy_tokenizer()(WORDS)["input_ids"]
    assert (
        client.completions.create(model="red", prompt=ids, temperature=0, max_tokens=5).choices[0].text
        == found.choices[0].text
    )


def test_stop_strings(client):
    whole = complete(client, "red", max_tokens=20).choices[0]
    words = whole.text.split()
    stop = words[2]
    first = whole.text.index(stop)
    found = complete(client, "red", max_tokens=20, stop=["nothing", stop]).choices[0]
    assert found.text == whole.text[:first] and found.finish_reason == "stop"
    streamed = list(complete(client, "red", max_tokens=20, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == whole.text[:first]


def test_log_probabilities(client):
    found = complete(client, "red", logprobs=2).choices[0]
    assert len(found.logprobs.tokens) == len(found.logprobs.token_logprobs) == len(found.logprobs.text_offset)
    for token, log_p, top in zip(
        *(getattr(found.logprobs, k) for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert len(top) == 2 and top[token] == max(top.values()) == log_p <= 0
    chat = client.chat.completions.create(
        model="red",
        messages=[{"role": "user", "content": WORDS}],
        temperature=0,
        max_tokens=3,
        logprobs=True,
        top_logprobs=1,
    )
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].token == entry.token and bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model: expected one of toy, auto, red, green; got 'nobody'"),
        ({"model": "red:x"}, openai.NotFoundError, "got 'red:x'"),
        ({"model": "red:1e999"}, openai.BadRequestError, "weights from -10 to 10"),
        ({"model": "red:1+red:2"}, openai.NotFoundError, "red:1"),
        ({"model": "classifier"}, openai.NotFoundError, "classifier"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 60}, openai.BadRequestError, "at most 54 behind this prompt of 6 tokens"),
        ({"n": 0}, openai.BadRequestError, "n: "),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs"),
        ({"prompt": [10**9]}, openai.BadRequestError, "token ids below 14"),
        ({"prompt": ""}, openai.BadRequestError, "at least one token"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"echo": True}, openai.BadRequestError, "echo"),
        ({"extra_body": {"unheard": 1}}, openai.BadRequestError, "unheard"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client, options, kind, said, stream):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "red", "prompt": WORDS, "max_tokens": 4, **options}, stream=stream)
    assert said in caught.value.body["message"] and caught.value.body["type"]


def test_keys(client):
    for key in ("wrong", "secret2", "-"):
        other = openai.OpenAI(base_url=client.base_url, api_key=key, max_retries=0)
        with other, pytest.raises(openai.AuthenticationError):
            other.models.list()


def test_a_client_that_goes_away_leaves_the_batch(client):
    engine = client.running.engine
    engine.eos_ids = frozenset()
    slow = engine._pass
    engine._pass = lambda: (time.sleep(0.05), slow())
    stream = complete(client, "red", max_tokens=50, temperature=1, seed=3, stream=True, logprobs=0)
    next(iter(stream))
    assert engine.running == 1
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client, "red", max_tokens=50, timeout=0.3)
    deadline = time.monotonic() + 5
    while engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert engine.tokens_made < 80
