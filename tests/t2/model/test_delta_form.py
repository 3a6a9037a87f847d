"""Models in the delta form: W x, and what experts add to it at the components of a support."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import t2
from t2.experts import support
from t2.generation.cached_batch import SVFRunner
from t2.generation.decode import DecodeOptions, complete
from t2kernels import DeltaWeight, DenseWeight
from t2kernels.packing import LEVELS
from tests.t2.model.test_serving_plan import free_building
from tests.t2.tiny_lm import CONFIGS, assert_same_state, prompts, state, wrap

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int4]


def wrap_delta(model, cache_dir, chosen=5, **options):
    return wrap(model, cache_dir, form="delta", support=chosen, **options)


def add_experts(svf, count, std=0.3):
    for i in range(count):
        noise = torch.randn(len(svf.support), generator=torch.Generator().manual_seed(i))
        z = torch.ones(svf.layout.R).index_add_(0, svf.support, std * noise)
        svf.add_expert(f"e{i}", t2.Expert(z, svf.layout))
    return [f"e{i}" for i in range(count)]


@pytest.mark.parametrize("family", CONFIGS)
def test_mixed_batch_is_the_merged_models_and_the_factored_form(tiny_model, cache_dir, family):
    svf = wrap_delta(tiny_model(family), cache_dir)
    names = add_experts(svf, 3)
    experts = [names[0], None, {names[1]: 0.25, names[2]: 0.75}, names[2]]
    ids = prompts(4)
    logits = svf(input_ids=ids, experts=experts).logits
    vectors = [svf.z_of(expert) for expert in experts]
    for row, expert in enumerate(experts):
        plain = svf.merged_copy(expert)
        torch.testing.assert_close(logits[row], plain(input_ids=ids[row : row + 1]).logits[0], atol=2e-3, rtol=1e-3)
    factored = wrap(svf.unload(), cache_dir)
    torch.testing.assert_close(logits, factored(input_ids=ids, experts=vectors).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_rows_are_the_dense_products_bit_for_bit(tiny_model, cache_dir, dtype):
    """In a mixed batch, alone, and beside experts of another support."""
    svf = wrap_delta(tiny_model("llama"), cache_dir, dtype=dtype)
    names = add_experts(svf, 2)
    ids = prompts(4)
    with torch.no_grad():
        alone = svf(input_ids=ids).logits
        mixed = svf(input_ids=ids, experts=[names[0], None, names[1], None]).logits
        with svf.route([None] * 4):
            routed = svf.model(input_ids=ids).logits
    assert torch.equal(mixed[[1, 3]], alone[[1, 3]]) and torch.equal(routed, alone)
    assert (mixed[0] - alone[0]).abs().max() > 0.01
    other = wrap_delta(svf.unload(), cache_dir, 9, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, alone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_and_unloading(tiny_model, cache_dir, family):
    model = tiny_model(family)
    before = state(model)
    svf = wrap_delta(model, cache_dir)
    names = add_experts(svf, 2)
    ids = prompts(3)
    out = svf.generate(input_ids=ids, experts=[names[0], None, names[1]], max_new_tokens=8)
    for row, name in enumerate([names[0], None, names[1]]):
        one = svf.merged_copy(name).generate(input_ids=ids[row : row + 1], max_new_tokens=8)
        assert torch.equal(out[row], one[0])
    assert_same_state(svf.unload(), before)


def test_our_decode_loop_runs_it(tiny_model, cache_dir):
    svf = wrap_delta(tiny_model("llama"), cache_dir)
    names = add_experts(svf, 2)
    rows = [ids for ids in prompts(3)]
    options = DecodeOptions(6, (2,), 0, torch.device("cpu"))
    with svf.route([names[1], None, names[0]]):
        together = [found.tokens for found in complete(SVFRunner(svf), rows, options)]
    for row, name in enumerate([names[1], None, names[0]]):
        with svf.route(name):
            assert torch.equal(complete(SVFRunner(svf), [rows[row]], options)[0].tokens, together[row])


def test_training_reaches_the_support_alone(tiny_model, cache_dir):
    model = tiny_model("llama")
    factored = wrap(copy.deepcopy(model), cache_dir)
    ids = prompts(2)

    def gradient(svf, z):
        svf(input_ids=ids, experts=z).logits.float().logsumexp(-1).sum().backward()
        return z.grad

    full = gradient(factored, torch.ones(factored.layout.R, requires_grad=True))
    svf = wrap_delta(model, cache_dir)
    own = gradient(svf, torch.ones(svf.layout.R, requires_grad=True))
    assert own.count_nonzero() == len(svf.support)
    torch.testing.assert_close(own[svf.support], full[svf.support], atol=1e-3, rtol=1e-3)
    z = svf.start_training()
    assert z.shape == svf.support.shape
    svf(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    torch.testing.assert_close(z.grad, full[svf.support], atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        z -= 0.01 * z.grad.sign()
    trained = svf.finish_training()
    assert torch.equal(support.support_of([trained]), svf.support)
    svf.add_expert("trained", trained)
    with pytest.raises(ValueError, match="z = 1 off the support"):
        svf.start_training(t2.Expert.random(svf.layout))


def test_an_expert_off_the_support_is_refused_wherever_it_comes_from(tiny_model, cache_dir):
    svf = wrap_delta(tiny_model("llama"), cache_dir)
    names = add_experts(svf, 2)
    other = t2.Expert.random(svf.layout, seed=9)
    for run in (
        lambda: svf.add_expert("other", other),
        lambda: svf.bank.add("other", other),
        lambda: svf.route(other).__enter__(),
        lambda: svf(input_ids=prompts(1), experts=other.z),
        lambda: svf(input_ids=prompts(1), experts=other.z.clone().requires_grad_()),
        lambda: svf(input_ids=prompts(1), experts={names[0]: 0.5, names[1]: 0.4}),
        lambda: svf.merged_copy(other),
    ):
        with pytest.raises(ValueError, match=r"expected z = 1 off the support of \d+ components"):
            run()
    assert "other" not in svf.bank
    svf.add_expert("other", svf.bank[names[0]])


def test_the_table_holds_the_supports_columns(tiny_model, cache_dir):
    svf = wrap_delta(tiny_model("llama"), cache_dir, 3, slots=1)
    assert len(svf.support) == 3 * len(svf.layout.names) < svf.layout.R
    add_experts(svf, 9)
    assert svf.slot_table.table.shape == (16, len(svf.support)) and svf.slot_table.table[9].any()
    assert not svf.slot_table.table[0].any()
    assert all(isinstance(layer.weight, DeltaWeight) for layer in svf.factored_layers.values())
    assert f"delta form with K={len(svf.support)}" in svf.extra_repr()


def test_a_plan_keeps_the_form_or_merges(tiny_model, cache_dir):
    svf = wrap_delta(tiny_model("llama"), cache_dir)
    names = add_experts(svf, 2)
    mixed = svf.plan(names, prompt_tokens=6, new_tokens=8)
    assert set(mixed.plan.forms()) == {"delta"} and "the model has the delta form" in mixed.explain()
    ids = prompts(2)
    plain = svf.generate(input_ids=ids, experts=names, max_new_tokens=8)
    assert torch.equal(svf.generate(input_ids=ids, experts=names, plan=mixed, max_new_tokens=8), plain)
    long = svf.plan(names[0], prompt_tokens=10**9, new_tokens=8, cost=free_building())
    assert set(long.plan.forms()) == {"merged"}
    assert torch.equal(svf.generate(input_ids=ids, experts=names[0], plan=long, max_new_tokens=8),
                       svf.generate(input_ids=ids, experts=names[0], max_new_tokens=8))  # fmt: skip
    svf.measure_plan(mixed)
    assert mixed.plan.measured["delta"] > 0
    with pytest.raises(ValueError, match="max_weight_error: expected None in the delta form"):
        svf.plan(names, prompt_tokens=6, new_tokens=8, max_weight_error=0.1)


@pytest.mark.parametrize("cached", [True, False])
def test_with_and_without_a_cache(tiny_model, cache_dir, cached):
    model = tiny_model("phi3")
    before = state(model)
    options = {"cache_dir": cache_dir} if cached else {"cache": False}
    svf = t2.SVFModel(model, t2.SVFConfig(form="delta", support=0.25, progress=False, **options))
    (name,) = add_experts(svf, 1)
    ids = prompts(1)
    torch.testing.assert_close(svf(input_ids=ids, experts=name).logits, svf.merged_copy(name)(input_ids=ids).logits,
                               atol=2e-3, rtol=1e-3)  # fmt: skip
    assert_same_state(svf.unload(), before)


def test_supports_of_every_kind(tiny_model, cache_dir, tmp_path):
    svf = wrap(tiny_model("llama"), cache_dir)
    layout = svf.layout
    z = torch.ones(layout.R)
    z[[0, 7, layout.R - 1]] = 1.1
    expert = t2.Expert(z, layout)
    expert.save(tmp_path / "a.safetensors")
    bank = t2.ExpertBank(layout)
    bank.add("a", expert)
    bank.save(tmp_path / "bank.safetensors")
    support.save(tmp_path / "support.safetensors", torch.tensor([0, 7, layout.R - 1]), layout)
    firsts = set(layout.offsets) - {0, layout.offsets[-1]}
    want = sorted({0, 7, layout.R - 1} | firsts)
    if layout.offsets[0] <= 7 < layout.ranks[0]:
        assert len(want) == 3 + len(layout.names) - 2
    for chosen in ("a.safetensors", "bank.safetensors", "support.safetensors"):
        assert support.resolve(tmp_path / chosen, layout).tolist() == want
    assert support.resolve(tmp_path, layout).tolist() == want
    assert support.resolve(torch.tensor([0, 7, layout.R - 1]), layout).tolist() == want
    assert support.counts(support.resolve(4, layout), layout) == (4,) * len(layout.names)
    shares = support.counts(support.resolve(0.5, layout), layout)
    assert shares == tuple(round(rank / 2) for rank in layout.ranks)
    assert support.resolve(10**6, layout).tolist() == list(range(layout.R))
    other = t2.Layout(layout.names, layout.ranks, "0" * 64)
    support.save(tmp_path / "other.safetensors", torch.tensor([0]), other)
    with pytest.raises(ValueError, match=r"other\.safetensors: expected base weights"):
        support.resolve(tmp_path / "other.safetensors", layout)


@pytest.mark.parametrize(
    ("chosen", "kind", "text"),
    [
        (0, ValueError, "support: expected an integer >= 1"),
        (-3, ValueError, "support: expected an integer >= 1"),
        (1.0, ValueError, "a share between 0 and 1"),
        (True, TypeError, "support: expected a number"),
        ([1, 2], TypeError, "support: expected a number"),
        (torch.tensor([3, 1]), ValueError, "increasing positions"),
        (torch.tensor([1.0]), ValueError, "increasing positions"),
        (torch.tensor([10**9]), ValueError, "increasing positions"),
        ("missing.safetensors", FileNotFoundError, "missing.safetensors"),
    ],
)
def test_supports_are_checked(tiny_model, cache_dir, chosen, kind, text):
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(kind, match=text):
        wrap_delta(model, cache_dir, chosen)
    assert_same_state(model, before)


def test_a_form_needs_its_support(tiny_model, cache_dir):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="support: expected components, a share, a file or positions"):
        wrap(model, cache_dir, form="delta")
    with pytest.raises(ValueError, match="support: expected None, as z is free in the factored form"):
        wrap(model, cache_dir, support=3)
    with pytest.raises(ValueError, match="form: expected 'factored' or 'delta', got 'dense'"):
        wrap(model, cache_dir, form="dense")


@pytest.mark.parametrize("dtype", LEVELS, ids=str)
def test_blocks_are_for_the_delta_form_and_are_not_merged(tiny_model, cache_dir, dtype):
    model = tiny_model("llama").requires_grad_(False)
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):  # as if it had come from a file of 4 bits
            layer.weight.copy_(DenseWeight.pack(layer.weight, dtype=torch.int4).matrix())
    with pytest.raises(ValueError, match=rf"dtype: expected {dtype} in the delta form only"):
        wrap(model, cache_dir, dtype=dtype)
    svf = wrap_delta(model, cache_dir, dtype=dtype)
    (name,) = add_experts(svf, 1)
    plan = svf.plan(name, prompt_tokens=512, new_tokens=4096, batch=32)
    others = {layer.form for layer in plan.plan.layers.values()} - {"delta"}
    assert not others or dtype != torch.int4  # 4 bits would drown what an expert changes
    assert {layer.packed.dtype for layer in svf.decomposed.packed.values()} == {torch.uint8}
    ids = prompts(2)
    merged, base = (svf.merged_copy(e)(input_ids=ids).logits for e in (name, None))
    change = svf(input_ids=ids, experts=name).logits - svf(input_ids=ids).logits
    assert float((change - (merged - base)).norm() / (merged - base).norm()) < 0.1


def test_a_factored_model_takes_a_support(tiny_model, cache_dir):
    """With the experts it has, as if it had been wrapped so."""
    svf = wrap(tiny_model("llama"), cache_dir)
    chosen = support.resolve(5, svf.layout)
    z = torch.ones(svf.layout.R).index_add_(0, chosen, 0.3 * torch.randn(len(chosen)))
    svf.add_expert("a", t2.Expert(z, svf.layout))
    ids = prompts(3)
    before = svf(input_ids=ids, experts=["a", None, "a"]).logits
    with pytest.raises(ValueError, match="off the support"):
        svf.take_support(chosen[1:])
    assert svf.support is None and torch.equal(svf(input_ids=ids, experts=["a", None, "a"]).logits, before)
    svf.take_support(chosen)
    after = svf(input_ids=ids, experts=["a", None, "a"]).logits
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)
    assert svf.svf_config.form == "delta" and torch.equal(svf.support, chosen)
    with pytest.raises(ValueError, match="take_support: expected a model of the factored form"):
        svf.take_support(chosen)
    wrapped = wrap_delta(svf.unload(), cache_dir)
    wrapped.add_expert("a", t2.Expert(z, wrapped.layout))
    assert torch.equal(wrapped(input_ids=ids, experts=["a", None, "a"]).logits, after)
