from __future__ import annotations

import pytest
import torch

import t2
from t2.adaptation import Adaptation, FewShotStrategy
from t2.adaptation.base import Template, mixed, user_words
from tests.t2.toy import SayTheWord, toy_tokenizer

NAMES = ("base", "green", "red")
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<s>system you help </s>{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)

INST = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{{ message['content'] }}\n<</SYS>>\n\n"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }} </s><s>{% endif %}{% endfor %}"
)


def adaptation(alpha: list, groups: tuple[int, ...] = ()) -> Adaptation:
    return Adaptation(NAMES, torch.tensor(alpha), 0.5, tuple("why" for _ in alpha), groups)


def test_choices(svf: t2.SVFModel):
    rows = [[1.0, 0, 0], [0, 0, 1.0], [0, 0.25, 0.75], [0.5, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0], [0.0, 0, 0]]
    choices = adaptation(rows).choices(svf)
    assert choices[:3] == [None, "red", {"green": 0.25, "red": 0.75}] and choices[4] == {"red": 0.5}
    assert choices[3] is choices[5] and choices[3].shape == (svf.layout.R,) and not choices[6].any()
    torch.testing.assert_close(choices[3], 0.5 + 0.5 * svf.bank["green"].z)
    z = torch.stack([svf.z_of(choice) for choice in choices])
    torch.testing.assert_close(z, mixed(svf.bank, NAMES, torch.tensor(rows)))


def test_mixing_is_that_of_the_bank(svf: t2.SVFModel):
    alpha = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected = svf.bank.mix(alpha[:, 1:]) + alpha[:, :1]
    torch.testing.assert_close(mixed(svf.bank, ("base", *svf.bank.names), alpha), expected)
    order = [2, 0, 3, 1]
    names = [("base", *svf.bank.names)[i] for i in order]
    torch.testing.assert_close(mixed(svf.bank, names, alpha[:, order]), expected)


def test_groups_of_matrices_have_weights_of_their_own(svf: t2.SVFModel):
    groups = tuple(i % 3 for i in range(len(svf.layout.names)))
    alpha = torch.rand(2, 3, 3)
    found = adaptation(alpha.tolist(), groups).choices(svf)
    for row, z in zip(alpha, found, strict=True):
        for name, group in zip(svf.layout.names, groups, strict=True):
            part = [torch.ones_like(svf.bank["red"][name]), svf.bank["green"][name], svf.bank["red"][name]]
            expected = sum(weight * values for weight, values in zip(row[group], part, strict=True))
            torch.testing.assert_close(z[svf.layout.window(name)], expected)
    same = adaptation([[[0, 1.0, 0]] * 3], groups).choices(svf)
    assert torch.equal(same[0], svf.bank["green"].z)


def test_bad_adaptations():
    with pytest.raises(ValueError, match=r"alpha: expected shape \[1, 3\], got \[1, 2\]"):
        adaptation([[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"alpha: expected shape \[1, 2, 3\], got \[1, 3\]"):
        adaptation([[1.0, 0.0, 0.0]], (0, 1))
    with pytest.raises(ValueError, match="names: expected 'base' first"):
        Adaptation(("red",), torch.ones(1, 1), 0.0, ("why",))


@pytest.mark.parametrize(
    "messages, words",
    [
        ([{"role": "user", "content": "say red"}], "say red"),
        ([{"role": "system", "content": "be kind"}, {"role": "user", "content": "say red\nnow"}], "say red\nnow"),
        (
            [
                {"role": "user", "content": "cat"},
                {"role": "assistant", "content": "dog"},
                {"role": "user", "content": "and user say one"},
            ],
            "and user say one",
        ),
    ],
)
def test_the_template_is_taken_off_a_prompt(messages: list[dict[str, str]], words: str):
    for template in (CHATML, INST):
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = template
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert user_words(text, tokenizer, Template.of(tokenizer)) == words


def test_some_templates_have_no_system_prompt():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    )
    assert len(Template.of(tokenizer).turns) == 1
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "cat"}], tokenize=False, add_generation_prompt=True
    )
    assert user_words(text, tokenizer, Template.of(tokenizer)) == "cat"


def test_a_prompt_without_a_template_is_the_users():
    tokenizer = toy_tokenizer()
    assert Template.of(tokenizer) is None and user_words("<s> say red", tokenizer, None) == "say red"
    tokenizer.chat_template = CHATML
    assert user_words("say red", tokenizer, Template.of(tokenizer)) == "say red"


def test_padding_is_no_word_but_the_same_token_within_is_the_templates(svf: t2.SVFModel):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    strategy = FewShotStrategy(svf, tokenizer, SayTheWord(), SayTheWord().problems("train"))
    ids = torch.tensor([[2, 2, 4, 2, 5], [2, 2, 2, 2, 6], [7, 2, 9, 2, 2]])
    assert strategy.read(ids) == ["say  red", "green", "blue  two"]
    assert strategy.read(ids, torch.tensor([[0, 0, 0, 0, 1]] * 3)) == ["red", "green", ""]
