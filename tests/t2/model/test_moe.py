"""Mixtures of experts: transformers' three-dimensional weights, matrix by matrix."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import t2
from t2.generation.compiled_pass import Compilation
from t2.generation.engine import Engine, Finished, Token
from t2.integrations.export import export_lora, export_merged, export_peft, export_vllm
from t2.model import moe
from t2.model.moe import RoutedExperts
from t2.weights.estimate import estimate_model
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.fused_experts import UnfusedExperts, is_fused, unfuse
from t2.weights.streaming import streams, target_weights
from tests.t2.toy import toy_tokenizer
from tests.t2.weights.live_bytes import LiveBytes

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "qwen3_moe": MOE,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "olmoe": MOE,
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1},
        **{"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0},
        **{"n_group": 1, "topk_group": 1},
    },
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24},
    "llama4_text": {
        **{
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
        **{"layer_types": ["full_attention"] * 2, "attention_chunk_size": 32},
    },
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [6, 7, 8, 9, 3], [9, 8, 7, 6, 5]])


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 3:  # some families leave them as memory was
                parameter.normal_(std=0.1)
            elif not parameter.isfinite().all():
                parameter.zero_()
    return model


def wrapped(family: str, **options) -> t2.SVFModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t2.SVFModel(model_of(family), t2.SVFConfig(progress=False, cache=False, **options))


def expert_of(svf: t2.SVFModel, seed: int = 1) -> torch.Tensor:
    z = torch.ones(svf.layout.R)
    free = torch.arange(svf.layout.R) if svf.support is None else svf.support
    z[free] += 0.2 * torch.randn(len(free), generator=torch.Generator().manual_seed(seed))
    return z


@pytest.mark.parametrize("form", [{}, {"form": "delta", "support": 4}], ids=["factored", "delta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_each_experts_merged_model(family, form):
    base = model_of(family)
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
    svf = wrapped(family, **form)
    assert svf.coverage.share >= 0.9 and any("experts.down.3" in name for name in svf.layout.names)
    one, two = expert_of(svf), expert_of(svf, 2)
    with torch.no_grad():
        mixed = svf(input_ids=IDS, experts=[None, one, two]).logits
        torch.testing.assert_close(mixed[0], plain[0], rtol=1e-3, atol=1e-4)
        for row, z in ((1, one), (2, two)):
            merged = svf.merged_copy(z)
            assert type(merged) is type(base) and not any(isinstance(m, UnfusedExperts) for m in merged.modules())
            torch.testing.assert_close(mixed[row], merged(input_ids=IDS).logits[row], rtol=1e-3, atol=1e-4)
            assert (mixed[row] - plain[row]).abs().max() > 1e-3
        alone = svf(input_ids=IDS[1:2], experts=[one]).logits
        torch.testing.assert_close(alone[0], mixed[1], rtol=1e-4, atol=1e-5)
        if family == "qwen3_moe":  # others' attention has products of torch's, which depend on the batch
            assert torch.equal(alone[0], mixed[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_is_given_back_as_it_was(family):
    before = model_of(family)
    svf = wrapped(family)
    assert not any(is_fused(module) for module in svf.modules())
    model = svf.unload()
    wanted, found = before.state_dict(), model.state_dict()
    assert list(wanted) == list(found) and all(torch.equal(wanted[name], found[name]) for name in wanted)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before(input_ids=IDS).logits)
    z = expert_of(svf := wrapped(family))
    merged, copied = svf.merged_copy(z).state_dict(), svf.merge_and_unload(z).state_dict()
    assert all(torch.equal(merged[name], copied[name]) for name in merged)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_gradient_is_that_of_the_merged_model(family):
    svf = wrapped(family)
    z = svf.start_training()
    svf(input_ids=IDS).logits.square().mean().backward()
    name = next(name for name in svf.layout.names if "experts.up.0" in name)
    window = svf.layout.window(name)
    step = torch.zeros(svf.layout.R)
    step[window] = torch.randn(window.stop - window.start, generator=torch.Generator().manual_seed(0))
    svf.finish_training()
    with torch.no_grad():
        ones, epsilon = torch.ones(svf.layout.R), 1e-2
        values = [
            float(svf(input_ids=IDS, experts=ones + sign * epsilon * step).logits.double().square().mean())
            for sign in (1, -1)
        ]
    wanted = (values[0] - values[1]) / (2 * epsilon)
    assert z.grad is not None and float(z.grad @ step) == pytest.approx(wanted, rel=0.05, abs=1e-6)


def test_generation_with_ragged_rows_is_that_of_each_alone():
    svf = wrapped("qwen3_moe")
    z = expert_of(svf)
    ids = torch.tensor([[0, 0, 5, 6], [6, 7, 8, 9], [0, 9, 8, 7]])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = svf.generate(input_ids=ids, attention_mask=mask, experts=[z, None, z], **options)
    for row, choice in enumerate([z, None, z]):
        own = ids[row][mask[row].bool()][None]
        alone = svf.generate(input_ids=own, attention_mask=torch.ones_like(own), experts=[choice], **options)
        assert torch.equal(together[row, 4:], alone[0, own.shape[1] :])


def test_one_call_runs_the_experts_of_all_tokens_also_of_the_base(monkeypatch):
    svf, calls = wrapped("qwen3_moe"), []
    whole = moe.grouped_linear
    monkeypatch.setattr(moe, "grouped_linear", lambda *args: (calls.append(1), whole(*args))[1])
    with torch.no_grad():
        for experts in (None, [None] * 3, [None, expert_of(svf), None]):
            calls.clear()
            svf(input_ids=IDS, experts=experts)
            assert len(calls) == 2 * 2  # of two blocks, inner and down


def test_hooks_of_the_experts_module_run_while_it_is_wrapped():
    model, seen = model_of("qwen3_moe"), []
    next(module for module in model.modules() if is_fused(module)).register_forward_hook(lambda *_: seen.append(1))
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False))
    seen.clear()
    with torch.no_grad():
        svf(input_ids=IDS)
        svf.unload()(input_ids=IDS)
    assert len(seen) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["factored", "delta"])
def test_a_mixture_that_streams_is_the_one_that_was_loaded_whole(tmp_path, family, form):
    """To the bit: its experts' matrices are read one by one, whether the checkpoint has them so or joined."""
    model_of(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    assert streams(tmp_path / "model", "auto")
    options = {"form": "delta", "support": 4} if form == "delta" else {}
    config = t2.SVFConfig(progress=False, cache_dir=tmp_path / "cache", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read, _ = t2.load_svf(tmp_path / "model", config)
        whole, _ = t2.load_svf(tmp_path / "model", config, stream="no")
    assert read.layout == whole.layout and any(".experts." in name for name in read.layout.names)
    assert read.coverage.share == whole.coverage.share
    z = expert_of(whole) if form == "factored" else whole.slot_table.with_columns(torch.rand(len(whole.support)))
    with torch.no_grad():
        for experts in ([None] * 3, [z, None, z]):
            found, want = (svf(input_ids=IDS, experts=experts).logits for svf in (read, whole))
            assert torch.equal(found, want)
    merged, expected = (svf.merged_copy(z).state_dict() for svf in (read, whole))
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)
    back, base = read.unload().state_dict(), model_of(family).state_dict()
    assert back.keys() == base.keys() and all(torch.equal(back[name], base[name]) for name in base)


def test_a_mixture_streams_whole_blocks_of_experts_or_none(tmp_path):
    model_of("qwen3_moe").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    config = t2.SVFConfig(progress=False, cache_dir=tmp_path / "cache", target_modules="attention")
    svf, _ = t2.load_factored(tmp_path / "model", config)
    assert any(is_fused(module) for module in svf.model.modules())
    with pytest.raises(ValueError, match=r"expected all layers of routed experts, or none, .* got all but .*gate.0"):
        target_weights(tmp_path / "model", r".*experts\.up\.[23]", dtype=torch.float32)


def test_a_mixture_that_streams_is_never_in_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads load is not seen
    config = AutoConfig.for_model("qwen3_moe", **(COMMON | MOE | {"num_experts": 32, "moe_intermediate_size": 64}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    options = t2.SVFConfig(progress=False, cache_dir=tmp_path / "cache", dtype=torch.int8)
    peaks = {}
    for way in ("yes", "no", "yes"):  # the first fills the cache
        with LiveBytes() as live:
            svf, _ = t2.load_svf(tmp_path / "model", options, stream=way)
        peaks[way] = live.peak
    dense = sum(4 * layer.in_features * layer.out_features for layer in svf.factored_layers.values())
    assert peaks["yes"] < dense < peaks["no"]


def test_targets_name_experts_alone_or_leave_them():
    only = wrapped("qwen3_moe", target_modules="experts")
    assert all(".experts." in name for name in only.layout.names) and only.coverage.share > 0.5
    some = wrapped("qwen3_moe", target_modules=r".*experts\.up\.[23]")
    assert len(some.layout.names) == 2 * 2
    attention = wrapped("qwen3_moe", target_modules="attention")
    assert not any(".experts." in name for name in attention.layout.names)
    assert any(is_fused(module) for module in attention.model.modules())  # left as they were
    mlp = wrapped("mixtral", target_modules="mlp")
    assert any(".experts." in name for name in mlp.layout.names)


def test_a_model_that_can_not_be_wrapped_is_as_it_was(monkeypatch):
    model = model_of("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("t2.model.decomposed.decompose", lambda weight: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False))
    found = model.state_dict()
    assert list(found) == list(before) and all(torch.equal(found[name], before[name]) for name in before)


def test_experts_that_hear_nothing_and_numbers_that_are_nobodys():
    model = model_of("qwen3_moe")
    (first, *_) = [name for name, module in model.named_modules() if is_fused(module)]
    fused = model.get_submodule(first)
    x = torch.randn(6, 32)
    index = torch.tensor([[0, 3], [0, 3], [3, 0], [0, 3], [0, 0], [3, 3]])
    weights = torch.rand(6, 2)
    with torch.no_grad():
        wanted = fused(x, index, weights)
        unfuse(model, "all-linear", RoutedExperts)
        experts = model.get_submodule(first)
        torch.testing.assert_close(experts(x, index, weights), wanted, rtol=1e-4, atol=1e-5)
        assert experts(x[:0], index[:0], weights[:0]).shape == (0, 32)
        nobody = index.clone()
        nobody[1] = 4  # what expert parallelism sends elsewhere
        found = experts(x, nobody, weights)
        assert not found[1].any()
        torch.testing.assert_close(found[2:], wanted[2:], rtol=1e-4, atol=1e-5)


def test_the_cache_is_filled_and_the_estimate_made_for_the_same_matrices(tmp_path):
    model = model_of("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    weights = target_weights(tmp_path / "model", "all-linear", dtype=torch.float32)
    cache = FactorCache(tmp_path / "cache")
    done = decompose_weights(weights, cache, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache_dir=tmp_path / "cache"))
    assert list(done) == list(svf.layout.names)
    assert {name: entry.key for name, entry in done.items()} == svf.weight_keys
    found = estimate_model(tmp_path / "model", dtype=torch.float32)
    assert found.expert == svf.layout.R and found.matrices == len(svf.layout.names)
    assert {shape.active for shape in found.shapes} == {0.5, 1.0}


def test_adapters_have_no_place_for_routed_experts(tmp_path):
    svf = wrapped("qwen3_moe")
    expert = t2.Expert(expert_of(svf), svf.layout)
    for export in (functools.partial(export_lora, rank=4), export_vllm, export_peft):
        with pytest.raises(ValueError, match="got one of routed experts too, such as"):
            export(svf, expert, tmp_path / "adapter")
    export_merged(svf, toy_tokenizer(), expert, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        want = svf(input_ids=IDS, experts=[expert.z] * 3).logits
        torch.testing.assert_close(found(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-4)


def test_the_engine_goes_on_without_a_compiled_program_and_says_why():
    engine, said = Engine(wrapped("qwen3_moe"), eos_ids=(2,), max_rows=3, max_tokens=40), []
    Compilation(engine, said.append).finish()
    assert len(said) == 1 and "a mixture of experts can't be compiled yet" in said[0]
    events: list[Token | Finished] = []
    engine.submit([5, 6, 7], events.append, max_tokens=5)
    while engine.step():
        pass
    assert isinstance(events[-1], Finished) and events[-1].reason in ("stop", "length")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_engine_answers_as_generate_does_alone(family):
    svf = wrapped(family)
    for seed in (1, 2):
        svf.add_expert(f"e{seed}", t2.Expert(expert_of(svf, seed), svf.layout))
    engine = Engine(svf, eos_ids=(2,), max_rows=3, max_tokens=40, chunk=3)
    given = []
    for i, prompt in enumerate(([5, 6, 7], [9, 8], [3, 3, 4, 5, 6], [7], [6, 7, 8, 9])):
        events: list[Token | Finished] = []
        choice = (None, "e1", "e2")[i % 3]
        engine.submit(prompt, events.append, max_tokens=8, expert=choice)
        given.append((prompt, choice, events))
    while engine.step():
        pass
    for prompt, choice, events in given:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        out = svf.generate(torch.tensor([prompt]), experts=[choice], **options)
        assert [event.id for event in events if isinstance(event, Token)] == out[0, len(prompt) :].tolist()
