from __future__ import annotations

import pytest
import torch

import t2
from t2.adaptation import PromptStrategy, two_pass
from tests.t2.adaptation.test_dispatch import DOMAINS, PROMPTS
from tests.t2.toy import SayTheWord, toy_tokenizer

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def strategy(svf: t2.SVFModel) -> PromptStrategy:
    return PromptStrategy(svf, toy_tokenizer(), DOMAINS, mixed=True)


def test_two_passes_are_those_of_explicit_experts(svf: t2.SVFModel, strategy: PromptStrategy):
    tokenizer, prompts = toy_tokenizer(), PROMPTS[:3]
    both = two_pass(svf, tokenizer, prompts, strategy, **GREEDY)
    texts = ["say red\n\n", "dog cat two\n\n", "say say say blue\n\n"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    expected = strategy.adapt(prompts)
    assert torch.equal(both.adaptation.alpha, expected.alpha)
    ids = batch["input_ids"]
    for row in range(3):
        z = expected.alpha[row, 0] + svf.bank.mix({"red": expected.alpha[row, 1], "green": expected.alpha[row, 2]})
        own = ids[row : row + 1, batch["attention_mask"][row].bool()]
        alone = svf.generate(input_ids=own, experts=[z], **GREEDY)[0, own.shape[1] :]
        assert tokenizer.decode(alone, skip_special_tokens=True) == both.answers[row]
    assert both.sequences.shape[0] == 3 and both.first_seconds > 0 and both.second_seconds > 0
    base = svf.generate(**{k: batch[k] for k in ("input_ids", "attention_mask")}, **GREEDY)
    assert not torch.equal(base, both.sequences)


def test_generate_reads_the_users_words_from_the_tokens(svf: t2.SVFModel, strategy: PromptStrategy):
    tokenizer = toy_tokenizer()
    texts = ["say red", "dog cat two", "say say blue"]
    batch = {k: v for k, v in tokenizer(texts, return_tensors="pt", padding=True).items() if k != "token_type_ids"}
    assert strategy.read(batch["input_ids"], batch["attention_mask"]) == texts
    assert strategy.read(batch["input_ids"]) == texts
    svf.set_adaptation(strategy)
    for given in ({"adapt": "prompt"}, {"adapt": strategy}, {"adapt": "prompt", "prompts": texts}):
        out = svf.generate(**batch, **given, **GREEDY)
        assert torch.equal(svf.last_adaptation.alpha, strategy.adapt(texts).alpha)
        assert torch.equal(out, svf.generate(**batch, experts=svf.last_adaptation.choices(svf), **GREEDY))
    out = svf.generate(batch["input_ids"], attention_mask=batch["attention_mask"], adapt="prompt", **GREEDY)
    assert torch.equal(out, svf.generate(**batch, adapt="prompt", **GREEDY))
    others = svf.generate(**batch, adapt="prompt", prompts=SayTheWord().problems("test")[:3], **GREEDY)
    assert not torch.equal(svf.last_adaptation.alpha, strategy.adapt(texts).alpha) and others.shape[0] == 3


def test_what_does_not_fit_is_refused(svf: t2.SVFModel, strategy: PromptStrategy):
    ids = torch.tensor([[4, 5]])
    for call, error, text in [
        (lambda: svf.generate(ids, adapt="prompt"), ValueError, "adapt: .* none: set_adaptation.*got 'prompt'"),
        (lambda: svf.generate(ids, adapt=3), TypeError, "adapt: expected a strategy or the name of one, got int"),
        (lambda: svf.generate(ids, adapt=strategy, experts=["red"]), ValueError, "adapt: expected neither experts"),
        (lambda: svf.generate(ids, prompts=["say"]), ValueError, "prompts: expected a strategy to read them"),
        (lambda: svf.generate(inputs_embeds=ids, adapt=strategy), ValueError, "prompts: expected the requests' texts"),
        (lambda: svf.generate(ids, adapt=strategy, prompts=["a", "b"]), ValueError, "experts: expected one entry for"),
        (lambda: two_pass(svf, toy_tokenizer(), [], strategy), ValueError, "prompts: expected at least one, got none"),
    ]:
        with pytest.raises(error, match=text):
            call()
