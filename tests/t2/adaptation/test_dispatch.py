from __future__ import annotations

import pytest
import torch

import t2
from t2.adaptation import ClassifierStrategy, Domain, PromptStrategy
from t2.adaptation.dispatch import CONTENT_FREE
from tests.t2.toy import SayTheWord, toy_tokenizer

DOMAINS = {"red": "say one", "green": "cat"}
PROMPTS = ["say red", [{"role": "user", "content": "dog cat two"}], SayTheWord().problems("test")[2], "say say blue"]


def test_alpha_is_one_hot_for_the_likeliest_label(svf: t2.SVFModel):
    strategy = PromptStrategy(svf, toy_tokenizer(), DOMAINS, calibration="none")
    adaptation = strategy.adapt(PROMPTS)
    assert adaptation.names == ("base", "red", "green")
    scores = strategy.label_scores(PROMPTS)
    assert torch.equal(adaptation.alpha, torch.nn.functional.one_hot(scores.argmax(-1), 3).float())
    assert adaptation.seconds > 0 and len(adaptation.reasons) == 4
    probabilities = scores.softmax(-1)
    assert adaptation.reasons[0].startswith(f"{strategy.labels[int(probabilities[0].argmax())]} ")
    assert f"{float(probabilities[0].max()):.0%}" in adaptation.reasons[0]


def test_contextual_calibration_divides_by_the_prior(svf: t2.SVFModel):
    strategy = PromptStrategy(svf, toy_tokenizer(), DOMAINS, mixed=True)
    alpha = strategy.adapt(PROMPTS).alpha
    raw, free = strategy.label_scores(PROMPTS).exp(), strategy.label_scores(CONTENT_FREE).exp()
    expected = raw / free.mean(0)
    torch.testing.assert_close(alpha, expected / expected.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)
    assert (alpha - raw).abs().max() > 1e-3
    torch.testing.assert_close(strategy.adapt(CONTENT_FREE[:1] * 2).alpha[0], strategy.adapt(CONTENT_FREE[:1]).alpha[0])


def test_a_label_that_is_always_likely_is_held_back(svf: t2.SVFModel, monkeypatch):
    biased = torch.tensor([[0.8, 0.15, 0.05], [0.9, 0.05, 0.05], [0.8, 0.05, 0.15]]).log()
    strategy = PromptStrategy(svf, toy_tokenizer(), DOMAINS, calibration="batch")
    monkeypatch.setattr(strategy, "label_scores", lambda prompts: biased[: len(prompts)])
    assert strategy.adapt(PROMPTS[:3]).alpha.argmax(-1).tolist() == [1, 0, 2]
    with pytest.raises(ValueError, match="prompts: expected at least two for calibration 'batch'"):
        strategy.adapt(PROMPTS[:1])
    strategy.calibrate(PROMPTS[:3])
    assert strategy.adapt(PROMPTS[:1]).alpha.argmax(-1).tolist() == [1]


def test_the_classifier_runs_pass_one_alone(svf: t2.SVFModel):
    classifier = ClassifierStrategy(svf, toy_tokenizer(), DOMAINS)
    base = PromptStrategy(svf, toy_tokenizer(), DOMAINS, calibration="none")
    assert (classifier.label_scores(PROMPTS) - base.label_scores(PROMPTS)).abs().max() > 0.01
    assert "classifier" not in classifier.adapt(PROMPTS).names and classifier.prior is None
    plain = t2.SVFModel(svf.merged_copy("classifier"), t2.SVFConfig(progress=False))
    for name in DOMAINS:
        plain.add_expert(name, t2.Expert.random(plain.layout))
    other = PromptStrategy(plain, toy_tokenizer(), DOMAINS, calibration="none")
    torch.testing.assert_close(classifier.label_scores(PROMPTS), other.label_scores(PROMPTS), atol=1e-4, rtol=1e-4)


def test_no_prompts(svf: t2.SVFModel):
    for calibration in ("none", "contextual", "batch"):
        adaptation = PromptStrategy(svf, toy_tokenizer(), DOMAINS, calibration=calibration).adapt([])
        assert adaptation.alpha.shape == (0, 3) and adaptation.choices(svf) == []


def test_what_does_not_fit_is_refused(svf: t2.SVFModel):
    tokenizer = toy_tokenizer()
    for call, error, text in [
        (lambda: PromptStrategy(svf, tokenizer, {"blue": ""}), ValueError, "domains: .*red, green, .*got 'blue'"),
        (lambda: PromptStrategy(svf, tokenizer, {}), ValueError, "domains: expected at least one"),
        (lambda: PromptStrategy(svf, tokenizer, [Domain("red"), Domain("red")]), ValueError, "name of its own"),
        (lambda: PromptStrategy(svf, tokenizer, ["red"]), TypeError, "domains: expected a list of Domain"),
        (lambda: Domain("others"), ValueError, "name: expected a name other than base and others, got 'others'"),
        (lambda: Domain("red", "two\nlines"), ValueError, "description: expected one line of text"),
        (lambda: PromptStrategy(svf, tokenizer, DOMAINS, calibration="x"), ValueError, "calibration: expected 'none'"),
        (lambda: PromptStrategy(svf, tokenizer, DOMAINS, token_budget=0), ValueError, "token_budget: expected an int"),
        (lambda: PromptStrategy(svf.model, tokenizer, DOMAINS), TypeError, "svf: expected an SVFModel"),
        (lambda: ClassifierStrategy(svf, tokenizer, DOMAINS, "judge"), ValueError, "expert: expected one of the bank"),
        (lambda: PromptStrategy(svf, tokenizer, DOMAINS).calibrate([]), ValueError, "prompts: expected at least one"),
        (lambda: PromptStrategy(svf, tokenizer, DOMAINS).adapt([3]), TypeError, "prompts: expected texts, problems"),
        (lambda: PromptStrategy(svf, tokenizer, DOMAINS).adapt([[{"role": "user"}]]), TypeError, "prompts: expected"),
    ]:
        with pytest.raises(error, match=text):
            call()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end token and a padding token"):
        PromptStrategy(svf, tokenizer, DOMAINS)
