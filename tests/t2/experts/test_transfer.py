from __future__ import annotations

import json
import math
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import t2
from t2 import Expert, Layout
from t2.eval.transfer import measure
from t2.experts.transfer import Alignment, TransferOptions, match, transfer
from t2.generation.batching import length_batches
from t2.generation.evaluate import evaluate_experts
from t2.weights.factor_cache import decompose
from tests.t2.toy import SayTheWord, toy_model, toy_tokenizer

KINDS = {"self_attn.q_proj": 6, "self_attn.k_proj": 3, "self_attn.o_proj": 6, "mlp.up_proj": 6, "mlp.down_proj": 6}
GPT2 = {"attn.c_attn": 6, "attn.c_proj": 6, "mlp.c_fc": 6, "mlp.c_proj": 6}


def layout_of(layers: int, kinds=KINDS, *, wider: int = 0, stack="model.layers", base="source") -> Layout:
    places = list(product(range(layers), kinds))
    return Layout(
        tuple(f"{stack}.{layer}.{kind}" for layer, kind in places),
        tuple(kinds[kind] + wider for _, kind in places),
        base.ljust(64, "0"),
        base,
    )


def llama(*, hidden=16, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=hidden + 8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


class TestSameShapes:
    def test_every_entry_stays_where_it_is(self):
        expert = Expert.random(layout_of(3), seed=1)
        moved = transfer(expert, layout_of(3, base="target"))
        assert torch.equal(moved.z, expert.z) and moved.layout.base_model == "target"
        there_and_back = transfer(moved, expert.layout)
        assert torch.equal(there_and_back.z, expert.z) and there_and_back.layout == expert.layout

    def test_the_order_of_modules_does_not_matter(self):
        expert, kinds = Expert.random(layout_of(2), seed=1), dict(reversed(KINDS.items()))
        moved = transfer(expert, layout_of(2, kinds))
        for name in expert.layout.names:
            assert torch.equal(moved[name], expert[name])

    def test_the_control_has_the_same_numbers_in_every_matrix_in_another_order(self):
        expert = Expert.random(layout_of(3), seed=1)
        shuffled = transfer(expert, layout_of(3, base="target"), shuffle_seed=4)
        for name in expert.layout.names:
            assert torch.equal(shuffled[name].sort()[0], expert[name].sort()[0])
        assert (shuffled.z != expert.z).float().mean() > 0.5
        assert torch.equal(shuffled.z, transfer(expert, layout_of(3), shuffle_seed=4).z)
        assert not torch.equal(shuffled.z, transfer(expert, layout_of(3), shuffle_seed=5).z)

    def test_metadata_tells_the_way(self):
        expert = Expert(torch.ones(layout_of(2).R), layout_of(2), {"task": "sums"})
        moved = transfer(expert, layout_of(2, base="target"), TransferOptions(depth="absolute"), shuffle_seed=7)
        note = json.loads(moved.metadata["transfer"])
        assert moved.metadata["task"] == "sums" and note["base_model"] == "source" and note["shuffle_seed"] == 7
        assert note["fingerprint"] == expert.layout.fingerprint and note["depth"] == "absolute"
        again = json.loads(transfer(moved, expert.layout).metadata["transfer"])
        assert again["base_model"] == "target" and json.loads(again["before"]) == note


class TestDepths:
    @pytest.mark.parametrize(
        "deep, target_deep, expected",
        [(2, 4, [0, 0, 1, 1]), (4, 2, [1, 3]), (3, 1, [1]), (1, 3, [0, 0, 0]), (30, 30, list(range(30)))],
    )
    def test_relative(self, deep, target_deep, expected):
        found = match(layout_of(deep), layout_of(target_deep))
        expected_names = [f"model.layers.{layer}.self_attn.k_proj" for layer in expected]
        assert [s for t, s in found.sources.items() if t.endswith("k_proj")] == expected_names
        assert len(found.unused) == len(KINDS) * (deep - len(set(expected)))

    def test_ends_meet(self):
        found = match(layout_of(30), layout_of(18))
        assert found.sources["model.layers.0.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
        assert found.sources["model.layers.17.mlp.up_proj"] == "model.layers.29.mlp.up_proj"

    def test_absolute(self):
        expert = Expert.random(layout_of(2), seed=1)
        with pytest.raises(ValueError, match=r"got 1 x model\.layers\.self_attn\.q_proj.*unmatched=base"):
            transfer(expert, layout_of(3), TransferOptions(depth="absolute"))
        moved = transfer(expert, layout_of(3), TransferOptions(depth="absolute", unmatched="base"))
        assert torch.equal(moved.z[: expert.layout.R], expert.z) and bool((moved.z[expert.layout.R :] == 1).all())
        assert json.loads(moved.metadata["transfer"])["matrices_at_1"] == len(KINDS)
        shallower = transfer(expert, layout_of(1), TransferOptions(depth="absolute"))
        assert torch.equal(shallower.z, expert.z[: shallower.layout.R])


class TestRanks:
    def test_leading(self):
        expert = Expert.random(layout_of(2), seed=1)
        wider = transfer(expert, layout_of(2, wider=3))
        for name in expert.layout.names:
            rank = len(expert[name])
            assert torch.equal(wider[name][:rank], expert[name]) and wider[name][rank:].tolist() == [1, 1, 1]
        assert torch.equal(transfer(wider, expert.layout).z, expert.z)
        narrower = transfer(expert, layout_of(2, wider=-1))
        for name in expert.layout.names:
            assert torch.equal(narrower[name], expert[name][:-1])

    def test_relative_interpolates(self):
        source, target = (Layout(("0.a",), (rank,), "f" * 64) for rank in (3, 5))
        expert = Expert(torch.tensor([0.0, 2.0, 6.0]), source)
        options = TransferOptions(ranks="relative")
        assert transfer(expert, target, options).z.tolist() == [0, 1, 2, 4, 6]
        assert torch.equal(transfer(transfer(expert, target, options), source, options).z, expert.z)


class TestFamilies:
    def test_same_kinds_under_other_names(self):
        kinds = {
            "attention.wq": "self_attn.q_proj",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
        }
        expert = Expert.random(layout_of(2), seed=1)
        moved = transfer(expert, layout_of(2, dict.fromkeys(kinds, 6), stack="decoder.blocks"))
        for mine, theirs in kinds.items():
            assert torch.equal(moved[f"decoder.blocks.1.{mine}"], expert[f"model.layers.1.{theirs}"])

    def test_fused_matrices_have_no_like(self):
        expert = Expert.random(layout_of(2), seed=1)
        target = layout_of(2, GPT2, stack="transformer.h")
        with pytest.raises(ValueError) as error:
            transfer(expert, target)
        text = str(error.value)
        assert "got 2 x transformer.h.attn.c_attn, 2 x transformer.h.mlp.c_fc without one" in text
        assert "2 x model.layers.mlp.up_proj left over" in text
        moved = transfer(expert, target, TransferOptions(unmatched="base"))
        assert bool((moved["transformer.h.0.attn.c_attn"] == 1).all())
        assert torch.equal(moved["transformer.h.1.attn.c_proj"], expert["model.layers.1.self_attn.o_proj"])
        assert torch.equal(moved["transformer.h.1.mlp.c_proj"], expert["model.layers.1.mlp.down_proj"])

    def test_nothing_matches(self):
        expert = Expert.random(layout_of(2), seed=1)
        for target in (layout_of(2, {"mixer.in_proj": 6}), Layout(("score",), (6,), "f")):
            with pytest.raises(ValueError, match="expected matrices like the expert's"):
                transfer(expert, target, TransferOptions(unmatched="base"))

    def test_stacks_match_by_name_or_where_one_is_left(self):
        def towers(*stacks):
            parts = [layout_of(2, {"self_attn.q_proj": 4}, stack=stack) for stack in stacks]
            names = tuple(name for part in parts for name in part.names)
            return Layout(names, (4,) * len(names), "f")

        both = match(towers("text.layers", "vision.layers"), towers("vision.layers", "language.layers"))
        assert both.sources["vision.layers.1.self_attn.q_proj"] == "vision.layers.1.self_attn.q_proj"
        assert both.sources["language.layers.1.self_attn.q_proj"] == "text.layers.1.self_attn.q_proj"
        unclear = match(towers("model.layers"), towers("vision.layers", "language.layers"))
        assert len(unclear.unmatched) == 4

    @pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3"])
    def test_llamas_kin(self, tiny_model, family):
        svf, target = (
            t2.SVFModel(tiny_model(name), t2.SVFConfig(cache=False, progress=False)) for name in ("llama", family)
        )
        expert = Expert.random(svf.layout, seed=3)
        assert torch.equal(transfer(expert, target.layout).z, expert.z)


def test_refusals():
    expert, layout = Expert.random(layout_of(2)), layout_of(2)
    for call, error, text in [
        (lambda: transfer(expert.z, layout), TypeError, "expert: expected a t2.Expert, got Tensor"),
        (lambda: transfer(expert, "model"), TypeError, "layout: expected a t2.Layout, got str"),
        (lambda: transfer(expert, layout, shuffle_seed=True), TypeError, "shuffle_seed: expected None or an integer"),
        (lambda: TransferOptions(depth="deep"), ValueError, "depth: expected one of relative, absolute, got 'deep'"),
        (lambda: TransferOptions(ranks="all"), ValueError, "ranks: expected one of leading, relative, got 'all'"),
        (lambda: TransferOptions(unmatched="x"), ValueError, "unmatched: expected one of error, base, got 'x'"),
        (lambda: match(layout, layout, "deep"), ValueError, "depth: expected one of"),
    ]:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("hidden, layers", [(16, 2), (24, 3)])
def test_models_of_two_shapes_and_depths(hidden, layers):
    source = t2.SVFModel(llama(), t2.SVFConfig(cache=False))
    target = t2.SVFModel(llama(hidden=hidden, layers=layers, seed=1), t2.SVFConfig(cache=False))
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    one = transfer(Expert(torch.ones(source.layout.R), source.layout), target.layout)
    assert torch.equal(target(input_ids=ids, experts=one).logits, target(input_ids=ids).logits)
    target.add_expert("moved", transfer(Expert.random(source.layout, std=0.5), target.layout))
    assert not torch.equal(target(input_ids=ids, experts="moved").logits, target(input_ids=ids).logits)


class TestAlignment:
    def test_of_a_weight_with_itself(self):
        factors = decompose(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
        found = Alignment.of(factors, factors)
        torch.testing.assert_close(found.same, torch.ones(5))
        torch.testing.assert_close(found.near(0), torch.ones(5))

    def test_products_are_those_of_the_built_changes(self):
        generator = torch.Generator().manual_seed(1)
        mine, theirs = (decompose(torch.randn(7, 5, generator=generator)) for _ in range(2))
        c, d = torch.randn(2, 5, generator=generator).double()
        built = ((mine.u * c) @ mine.vh.double(), (theirs.u * d) @ theirs.vh.double())
        found = Alignment.of(*(type(f)(*(t.double() for t in f)) for f in (mine, theirs)))
        torch.testing.assert_close(found.products(c, d), (built[0] * built[1]).sum())

    def test_equal_values_turn_within_their_span(self):
        """Two equal singular values and a turn of their vectors: the positions part, the span stays."""
        angle = 0.7
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        mine = decompose(torch.diag(torch.tensor([3.0, 2.0, 2.0, 1.0])))
        u, vh = mine.u.clone(), mine.vh.clone()
        u[:, 1:3], vh[1:3] = u[:, 1:3] @ turn, turn.T @ vh[1:3]
        found = Alignment.of(mine, type(mine)(u, mine.s, vh))
        torch.testing.assert_close(found.same, torch.tensor([1, math.cos(angle), math.cos(angle), 1]))
        torch.testing.assert_close(found.near(1), torch.ones(4))

    def test_far_off_positions_are_not_near(self):
        mine = decompose(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
        other = type(mine)(mine.u.flip(1), mine.s, mine.vh.flip(0))
        assert Alignment.of(mine, other).near(1).tolist() == [0, 1, 1, 0]

    def test_another_shape(self):
        mine, other = decompose(torch.randn(7, 5)), decompose(torch.randn(7, 6))
        with pytest.raises(ValueError, match=r"target: expected factors of a weight \[7, 5\], got \[7, 6\]"):
            Alignment.of(mine, other)


class TestMeasure:
    @pytest.fixture
    def svf(self):
        return t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))

    def test_rows_of_one_batch_are_what_each_expert_says_alone(self, svf):
        task, tokenizer = SayTheWord(), toy_tokenizer()
        problems = task.problems("test")
        experts = {"base": None} | {f"e{i}": Expert.random(svf.layout, std=1.0, seed=i) for i in range(4)}
        together = evaluate_experts(svf, experts, task, problems, tokenizer)
        counts: list[int] = []
        small = evaluate_experts(svf, experts, task, problems, tokenizer, token_budget=60, announce=counts.append)
        assert together == small and counts[-1] == len(problems) and len(counts) > 1
        for name, expert in experts.items():
            for i, problem in enumerate(problems):
                alone = evaluate_experts(svf, {name: expert}, task, [problem], tokenizer)[name]
                assert alone.answers[0] == together[name].answers[i] and alone.scores[0] == together[name].scores[i]
        assert len({found.answers for found in together.values()}) > 1

    def test_nothing_to_answer(self, svf):
        found = evaluate_experts(svf, {"base": None}, SayTheWord(), [], toy_tokenizer())
        assert found["base"].answers == ()
        with pytest.raises(ValueError, match="experts: expected at least one, got none"):
            evaluate_experts(svf, {}, SayTheWord(), [], toy_tokenizer())

    def test_conditions(self, svf):
        source = t2.SVFModel(toy_model(seed=1), t2.SVFConfig(progress=False))
        expert = Expert.random(source.layout, std=1.0, seed=2)
        found = measure(svf, expert, SayTheWord(), toy_tokenizer(), problems=5, shuffle_seeds=(3, 8))
        assert list(found["conditions"]) == ["base", "ordered", "shuffled 3", "shuffled 8"]
        assert found["problems"] == 5 and all(len(row["scores"]) == 5 for row in found["conditions"].values())
        moved = {"ordered": transfer(expert, svf.layout), "s": transfer(expert, svf.layout, shuffle_seed=8)}
        problems = SayTheWord().problems("test")[:5]
        alone = evaluate_experts(svf, moved, SayTheWord(), problems, toy_tokenizer())
        assert found["conditions"]["ordered"]["scores"] == alone["ordered"].scores
        assert found["conditions"]["shuffled 8"]["scores"] == alone["s"].scores
        json.dumps(found)
        with pytest.raises(ValueError, match="problems: expected at least 1, got 0"):
            measure(svf, expert, SayTheWord(), toy_tokenizer(), problems=0)


def test_batches_keep_the_budget():
    lengths = [5, 1, 9, 2, 2, 30]
    found = list(length_batches([length + 3 for length in lengths], 20))
    assert sorted(index for batch in found for index in batch) == list(range(6))
    for batch in found:
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 3) <= 20
    assert list(length_batches([], 20)) == []
