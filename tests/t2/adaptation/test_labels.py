from __future__ import annotations

import pytest
import torch

import t2
from t2.adaptation.labels import label_scores, label_tokens
from tests.t2.toy import toy_tokenizer

PROMPTS = [torch.tensor(ids) for ids in ([4, 4, 5, 6], [4, 4, 5, 6, 7, 9], [4, 4, 7], [4, 4, 12, 13, 8])]
LABELS = {
    "first tokens differ": ("red", "green", "blue"),
    "one is another's beginning": ("red", "red cat", "green"),
    "longer": ("red cat dog one", "red cat dog two", "red dog", "blue one two three four", "green"),
    "one alone": ("red cat",),
}


def reference(model, prompt: torch.Tensor, labels: tuple[str, ...]) -> torch.Tensor:
    """Every label behind its prompt, alone, token by token, in float64 after the logits."""
    tokenizer = toy_tokenizer()
    whole = [[*tokenizer(label, add_special_tokens=False)["input_ids"], 2] for label in labels]
    scores = []
    for ids in whole:
        total = 0.0
        for t, token in enumerate(ids):
            row = model(torch.cat([prompt, torch.tensor(ids[:t], dtype=torch.int64)]).unsqueeze(0)).logits[0, -1]
            allowed = sorted({other[t] for other in whole if other[:t] == ids[:t]})
            total += float(row.double()[token] - row.double()[allowed].logsumexp(0))
        scores.append(total)
    return torch.tensor(scores)


@pytest.mark.parametrize("expert", [None, "classifier"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
@torch.no_grad()
def test_scores_are_those_of_each_label_alone(svf: t2.SVFModel, labels: tuple[str, ...], expert, budget: int):
    found = label_scores(
        svf, PROMPTS, label_tokens(labels, toy_tokenizer()), pad_token=0, expert=expert, token_budget=budget
    )
    plain = svf.merged_copy(expert)
    expected = torch.stack([reference(plain, prompt, labels) for prompt in PROMPTS])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(PROMPTS)), atol=1e-5, rtol=0)
    assert len(labels) == 1 or found.std() > 0.1


def test_labels_are_read_only_as_far_as_they_differ():
    tokens = label_tokens(("red", "green cat", "blue"), toy_tokenizer())
    assert tokens.tokens == ((5,), (6,), (7,)) and tokens.permitted == (((5, 6, 7),),) * 3
    tokens = label_tokens(("red", "red cat", "blue"), toy_tokenizer())
    assert tokens.tokens == ((5, 2), (5, 12), (7,)) and tokens.permitted[0] == ((5, 7), (2, 12))


def test_different_first_tokens_take_one_pass(svf: t2.SVFModel):
    calls = []
    svf.model.register_forward_pre_hook(lambda _, __, given: calls.append(given["input_ids"].shape), with_kwargs=True)
    label_scores(svf, PROMPTS[:2], label_tokens(LABELS["first tokens differ"], toy_tokenizer()), pad_token=0)
    assert calls == [(2, 6)]


def test_labels_that_read_alike_are_refused():
    with pytest.raises(
        ValueError, match=r"labels: expected labels that the tokenizer tells apart, got \['what', 'which'\]"
    ):
        label_tokens(("what", "which"), toy_tokenizer())


def test_no_prompts_have_no_scores(svf: t2.SVFModel):
    assert label_scores(svf, [], label_tokens(("red", "blue"), toy_tokenizer()), pad_token=0).shape == (0, 2)


def test_sliding_windows_do_not_share_what_prompts_begin_with(tiny_model):
    svf = t2.SVFModel(tiny_model("mistral"), t2.SVFConfig(progress=False))
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, 90, (20,), generator=generator)
    prompts = [torch.cat([start, torch.randint(3, 90, (n,), generator=generator)]) for n in (1, 9, 4)]
    labels = label_tokens(LABELS["longer"], toy_tokenizer())
    together = label_scores(svf, prompts, labels, pad_token=0)
    alone = torch.cat([label_scores(svf, [prompt], labels, pad_token=0) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
