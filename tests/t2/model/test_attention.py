"""Guard of the attention kernel: each condition that fails alone sends a pass to transformers' attention."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn

from t2.model import attention

ROWS, HEADS, KEY_HEADS, LENGTH, HEAD_DIM = 2, 4, 2, 5, 16


def step(tokens=1, head_dim=HEAD_DIM, dtype=torch.float32, key_rows=ROWS, key_heads=KEY_HEADS, key_dim=None, **changes):
    """Arguments of a decode step that the kernel runs, with some of them replaced."""
    key = torch.ones(key_rows, key_heads, LENGTH, key_dim or head_dim, dtype=dtype)
    given = {
        "query": torch.ones(ROWS, HEADS, tokens, head_dim, dtype=dtype),
        "key": key,
        "value": key.clone(),
        "attention_mask": torch.ones(ROWS, 1, 1, LENGTH, dtype=torch.bool),
    }
    return given | changes


def tracked(*shape):
    return torch.ones(shape, requires_grad=True)


QUERY, KEY = (ROWS, HEADS, 1, HEAD_DIM), (ROWS, KEY_HEADS, LENGTH, HEAD_DIM)
REFUSED = {
    "more than one token a row, which share keys": lambda: step(
        tokens=2, attention_mask=None, is_causal=False, shared=True
    ),
    "more keys than tokens that look at those before them": lambda: step(tokens=2, attention_mask=None),
    "another device": lambda: step(query=torch.ones(QUERY, device="meta")),
    "a dtype the kernel has not": lambda: step(dtype=torch.float64),
    "a head_dim that is no multiple of 16": lambda: step(head_dim=24),
    "keys and values of another dtype": lambda: step(query=torch.ones(QUERY, dtype=torch.bfloat16)),
    "values of another dtype": lambda: step(value=torch.ones(KEY, dtype=torch.bfloat16)),
    "more values than keys": lambda: step(value=torch.ones(ROWS, KEY_HEADS, LENGTH + 1, HEAD_DIM)),
    "values of another width": lambda: step(value=torch.ones(ROWS, KEY_HEADS, LENGTH, 2 * HEAD_DIM)),
    "keys of fewer rows": lambda: step(key_rows=1),
    "keys of another width": lambda: step(key_dim=2 * HEAD_DIM),
    "key heads that do not divide the heads": lambda: step(key_heads=3),
    "an additive mask": lambda: step(attention_mask=torch.zeros(ROWS, 1, 1, LENGTH)),
    "a mask of one row for all": lambda: step(attention_mask=torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)),
    "a mask of each head": lambda: step(attention_mask=torch.ones(ROWS, HEADS, 1, LENGTH, dtype=torch.bool)),
    "a mask of two tokens": lambda: step(attention_mask=torch.ones(ROWS, 1, 2, LENGTH, dtype=torch.bool)),
    "a mask longer than the keys": lambda: step(attention_mask=torch.ones(ROWS, 1, 1, LENGTH + 1, dtype=torch.bool)),
    "dropout": lambda: step(dropout=0.1),
    "attention weights asked for": lambda: step(output_attentions=True),
    "a query in a graph": lambda: step(query=tracked(*QUERY)),
    "a key in a graph": lambda: step(key=tracked(*KEY)),
    "a value in a graph": lambda: step(value=tracked(*KEY)),
    **{f"option {name}": lambda name=name: step(**{name: 1.0}) for name in attention._OTHERS},
}
ACCEPTED = {
    "a mask of keys": step,
    "no mask": lambda: step(attention_mask=None),
    "bfloat16": lambda: step(dtype=torch.bfloat16),
    "float16": lambda: step(dtype=torch.float16),
    "as many key heads as heads": lambda: step(key_heads=HEADS),
    "a prompt": lambda: step(tokens=LENGTH, attention_mask=None),
    "a prompt and a mask": lambda: step(tokens=3, attention_mask=torch.ones(ROWS, 1, 3, LENGTH, dtype=torch.bool)),
    "a mask of tokens for all rows": lambda: step(
        tokens=3, attention_mask=torch.ones(1, 1, 3, LENGTH, dtype=torch.bool)
    ),
    "tokens that look at all keys": lambda: step(tokens=3, attention_mask=None, is_causal=False),
    "rows that share keys": lambda: step(attention_mask=None, shared=True),
    "options that say no": lambda: step(output_attentions=False, dropout=0.0, **dict.fromkeys(attention._OTHERS)),
}


@pytest.fixture
def ran(monkeypatch):
    """Runs `attention` on a module that was taken over and returns which of both functions it called."""

    def run(given, marked=True):
        calls = []

        def kernel(query, *_):
            calls.append("kernel")
            return query

        monkeypatch.setattr(attention.ops, "decode_attention", kernel)
        monkeypatch.setattr(attention, "_sdpa", lambda *_, **__: calls.append("sdpa"))
        module = nn.Module()
        if marked:
            attention.take_over([module])
        if given.pop("shared", False):
            with attention.shared_keys(torch.zeros(ROWS, dtype=torch.int64)):
                attention.attention(module, **given | {"attention_mask": torch.tensor([[[[0, LENGTH]]]] * ROWS)})
        else:
            attention.attention(module, **given)
        (call,) = calls
        return call

    return run


@pytest.mark.parametrize("given", ACCEPTED.values(), ids=list(ACCEPTED))
def test_passes_run_on_the_kernel(ran, given):
    assert ran(given()) == "kernel"


@pytest.mark.parametrize("given", REFUSED.values(), ids=list(REFUSED))
def test_one_condition_that_fails_is_enough_to_fall_back(ran, given):
    assert ran(given()) == "sdpa"


def test_a_build_without_the_extension_falls_back(ran, monkeypatch):
    monkeypatch.setattr(attention, "extension", None)
    assert ran(step()) == "sdpa"


def test_modules_that_were_not_taken_over_fall_back(ran):
    assert ran(step(), marked=False) == "sdpa"


def test_shared_keys_want_ranges():
    with attention.shared_keys(torch.zeros(ROWS, dtype=torch.int64)), pytest.raises(TypeError, match="ranges"):
        attention.attention(nn.Module(), **step())


def test_shared_keys_are_the_same_on_the_kernel_and_off_it():
    """Rows look at windows of any row's keys."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(4, HEADS, 1, HEAD_DIM, generator=g)
    key, value = (torch.randn(3, KEY_HEADS, 9, HEAD_DIM, generator=g) for _ in range(2))
    ranges = torch.tensor([[0, 4], [2, 9], [0, 1], [5, 7]])[:, None, None]
    found = []
    for marked in (False, True):
        module = nn.Module()
        module.num_key_value_groups = HEADS // KEY_HEADS
        if marked:
            attention.take_over([module])
        with attention.shared_keys(torch.tensor([2, 0, 2, 1])):
            found.append(attention.attention(module, query, key, value, ranges)[0])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors_of_a_graph_run_on_the_kernel_where_no_gradient_is_recorded(ran, name):
    with torch.no_grad():
        assert ran(step(**{name: tracked(*(QUERY if name == "query" else KEY))})) == "kernel"


def test_every_line_of_the_guard_has_a_case():
    """Each operand of the guard's conjunction, negated alone, is what some case above flips."""
    function = ast.parse(inspect.getsource(attention._runs))
    (conjunction,) = (node.value for node in ast.walk(function) if isinstance(node, ast.Return))
    assert isinstance(conjunction, ast.BoolOp) and isinstance(conjunction.op, ast.And)
    operands = [compile(ast.Expression(operand), "guard", "eval") for operand in conjunction.values]
    flipped = []
    for make in REFUSED.values():
        given = make()
        key_rows = torch.zeros(ROWS) if given.pop("shared", False) else None
        is_causal = attention._is_causal(nn.Module(), given["query"], given["attention_mask"], given.get("is_causal"))
        query, key, mask = given["query"], given["key"], given["attention_mask"]
        rows, heads, tokens, head_dim = query.shape
        names = {"query": query, "key": key, "value": given["value"], "mask": mask, "dropout": given.get("dropout", 0)}
        options = {name: value for name, value in given.items() if name not in (*names, "attention_mask")}
        sizes = {"rows": rows, "heads": heads, "tokens": tokens, "head_dim": head_dim}
        scope = vars(attention) | names | sizes | {"options": options, "key_rows": key_rows, "is_causal": is_causal}
        failing = [i for i, operand in enumerate(operands) if not eval(operand, scope)]
        assert len(failing) == 1, ast.unparse(conjunction.values[failing[0]])
        flipped += failing
    missing = [ast.unparse(conjunction.values[i]) for i in set(range(len(operands))) - set(flipped)]
    assert missing == ["extension is not None"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 7, 13])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("padding", [(0, 0), (0, 9)], ids=str)
def test_a_token_of_a_prompt_has_the_bits_of_a_decode_step(dtype, group, window, padding):
    """Also one that looks back at a window of keys, or that has padding before its prompt."""
    tokens, key_heads, head_dim = 77, 2, 32
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, tokens, key_heads * group, head_dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, key_heads, tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    own, keys = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = (keys <= own) & (keys > own - (window or tokens))
    mask = mask & (keys >= torch.tensor(padding)[:, None, None])
    module = nn.Module()
    module.num_key_value_groups = group
    attention.take_over([module])
    given = None if window is None and not any(padding) else mask[:, None]
    together, _ = attention.attention(module, query, key, value, given)
    truth, _ = attention._sdpa(module, query.double(), key.double(), value.double(), mask[:, None])
    near = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 2e-2}
    for row, first in enumerate(padding):
        torch.testing.assert_close(together[row, first:].double(), truth[row, first:], **near)
    for token in (0, 1, 15, 16, 40, tokens - 1):
        alone, _ = attention.attention(
            module, query[:, :, token : token + 1], key, value, mask[:, None, token : token + 1]
        )
        assert torch.equal(alone[:, 0], together[:, token])
