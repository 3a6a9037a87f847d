"""Models that the engine of single tokens refuses: the same requests in whole batches, each answer as it is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, MambaConfig, T5Config, T5ForConditionalGeneration

import t2
from t2.generation.compiled_pass import Compilation
from t2.generation.engine import Engine
from t2.generation.sampling import Sampling
from t2.generation.whole_batches import WholeBatchEngine
from t2.server.opened import open_engine
from tests.t2.generation.test_engine import Answer, prompts

SIZES = dict(vocab_size=14, hidden_size=32, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "state": MambaConfig(state_size=4, **SIZES),
    "state and keys": FalconH1Config(
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        **SIZES,
    ),
}


def model_of(kind: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.2)
    return model


@pytest.fixture(params=MODELS)
def svf(request):
    made = t2.SVFModel(model_of(request.param), t2.SVFConfig(progress=False))
    for i in range(2):
        made.add_expert(f"e{i}", t2.Expert.random(made.layout, std=0.5, seed=i))
    return made


def engine_of(svf, **options) -> WholeBatchEngine:
    with pytest.raises(TypeError):
        Engine(svf, eos_ids=(2,))
    return WholeBatchEngine(svf, **{"eos_ids": (2,), "max_rows": 4, "max_tokens": 60, **options})


def finish(engine) -> None:
    while engine.step():
        pass


def alone(svf, prompt, expert, new_tokens) -> list[int]:
    out = svf.generate(torch.tensor([prompt]), experts=[expert], max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.filterwarnings("ignore:these layers stay dense")
def test_answers_are_those_of_generate(svf):
    engine, given = engine_of(svf), []
    for i, prompt in enumerate(prompts(9)):
        given.append((prompt, (None, "e0", "e1")[i % 3], 3 + i, Answer()))
        engine.submit(prompt, given[-1][3], max_tokens=3 + i, expert=given[-1][1])
    finish(engine)
    answers = [alone(svf, prompt, expert, most) for prompt, expert, most, _ in given]
    assert [answer.ids for *_, answer in given] == answers
    assert len({tuple(answer) for answer in answers}) > 4
    for answer, (_, _, most, _) in zip((a for *_, a in given), given, strict=True):
        assert answer.end.reason == ("stop" if answer.ids[-1] == 2 else "length") and len(answer.ids) <= most


@pytest.mark.filterwarnings("ignore:these layers stay dense")
def test_draws_and_log_probabilities_do_not_depend_on_the_batch(svf):
    def drawn(company: int) -> list:
        engine, answer = engine_of(svf, eos_ids=()), Answer()
        engine.submit([4, 5, 6], answer, max_tokens=6, expert="e0", sampling=Sampling(1.3, seed=3), likeliest=2)
        for i in range(company):
            engine.submit([7 + i, 5, 6], Answer(), max_tokens=9, sampling=Sampling(1.0))
        finish(engine)
        return answer.tokens

    one, other = drawn(0), drawn(3)
    assert [token.id for token in one] == [token.id for token in other] and len(one) == 6
    for a, b in zip(one, other, strict=True):
        assert a.log_p == pytest.approx(b.log_p, abs=1e-4)
        assert a.likeliest[0][1] >= a.likeliest[1][1]


@pytest.mark.filterwarnings("ignore:these layers stay dense")
def test_a_request_leaves_its_batch(svf):
    engine, kept = engine_of(svf, eos_ids=()), Answer()

    class Leaving(Answer):
        def __call__(self, event) -> None:
            super().__call__(event)
            if len(self.tokens) == 3:
                request.cancel()

    left = Leaving()
    request = engine.submit([4, 5], left, max_tokens=20, expert="e1")
    engine.submit([4, 5, 6], kept, max_tokens=8)
    finish(engine)
    assert left.end.reason == "cancelled" and len(left.tokens) == 3
    assert kept.ids == alone_without_end(svf, [4, 5, 6], 8) and kept.end.reason == "length"
    assert svf.slot_table.in_use == 1 + 2


def alone_without_end(svf, prompt, new_tokens) -> list[int]:
    engine, answer = engine_of(svf, eos_ids=()), Answer()
    engine.submit(prompt, answer, max_tokens=new_tokens)
    finish(engine)
    return answer.ids


@pytest.mark.filterwarnings("ignore:these layers stay dense")
def test_such_models_are_opened_with_a_line_that_says_so(tmp_path):
    model_of("state").save_pretrained(tmp_path)
    from tests.t2.toy import toy_tokenizer

    toy_tokenizer().save_pretrained(tmp_path)
    news: list[str] = []
    opened = open_engine(str(tmp_path), None, dtype=torch.float32, news=news.append, max_rows=2)
    assert isinstance(opened.engine, WholeBatchEngine)
    assert len(news) == 1 and "whole batches" in news[0] and "MambaForCausalLM" in news[0]
    with Compilation(opened.engine, news.append) as compilation:
        compilation.finish()
    assert len(news) == 2 and "passes are not compiled" in news[1]


def test_models_that_do_not_go_on_behind_their_prompt_are_refused():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=14, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    svf = t2.SVFModel(model.eval(), t2.SVFConfig(progress=False, verify=False))
    with pytest.raises(TypeError, match="a decoder of transformers that generates, got T5ForConditionalGeneration"):
        WholeBatchEngine(svf, eos_ids=(2,))
