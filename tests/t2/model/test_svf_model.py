from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import t2
from t2.model.layers import PackedLinear, RoutedLinear
from t2.weights.factor_cache import FactorCache
from t2kernels.weights import FactoredGroup
from tests.t2.tiny_lm import CONFIGS, add_random_experts, assert_same_state, prompts, state, wrap

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("family", CONFIGS)
def test_mixed_batch_is_the_merged_models(tiny_model, cache_dir, family):
    svf = wrap(tiny_model(family), cache_dir)
    names = add_random_experts(svf, 3)
    experts = [names[0], None, {names[1]: 0.25, names[2]: 0.5}, names[2]]
    ids = prompts(len(experts))
    logits = svf(input_ids=ids, experts=experts).logits
    base_logits = svf(input_ids=ids).logits
    for row, expert in enumerate(experts):
        plain = svf.merged_copy(expert)
        assert not any(isinstance(module, RoutedLinear) for module in plain.modules())
        torch.testing.assert_close(logits[row], plain(input_ids=ids[row : row + 1]).logits[0], atol=2e-3, rtol=1e-3)
    assert torch.equal(logits[1], base_logits[1])
    assert (logits[0] - base_logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_every_linear_but_the_head_is_a_target(tiny_model, cache_dir, family):
    svf = wrap(tiny_model(family), cache_dir)
    left = [name for name, m in svf.model.named_modules() if type(m) is nn.Linear]
    assert left == [] and type(svf.model.lm_head) is PackedLinear
    per_layer = {"phi3": 4, "gpt2": 4}.get(family, 7)
    assert len(svf.layout.names) == 2 * per_layer
    assert sum(svf.layout.ranks) == svf.layout.R == svf.layout.offsets[-1] + svf.layout.ranks[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampling", "beams", "beams-return-2", "sampling-return-3"],
)
def test_generate_routes_every_row(tiny_model, cache_dir, family, options):
    svf = wrap(tiny_model(family), cache_dir)
    names = add_random_experts(svf, 2)
    experts = [names[0], None, names[1]]
    ids = prompts(3)
    sampled = options.get("do_sample", False)
    torch.manual_seed(0)
    out = svf.generate(input_ids=ids, experts=experts, max_new_tokens=8, **options)
    k = options.get("num_return_sequences", 1)
    assert out.shape[0] == 3 * k
    with svf.route(experts):
        torch.manual_seed(0)
        assert torch.equal(out, svf.model.generate(input_ids=ids, max_new_tokens=8, **options))
    if sampled:  # sampled tokens must be likely under the row's own expert

        def likelihood(experts):
            logits = svf(input_ids=out, experts=[expert for expert in experts for _ in range(k)]).logits
            return logits.log_softmax(-1)[:, 5:-1].gather(-1, out[:, 6:, None]).sum()

        assert likelihood(experts) > likelihood([names[1], names[0], None])
        return
    for row, expert in enumerate(experts):
        plain = svf.merged_copy(expert).generate(input_ids=ids[row : row + 1], max_new_tokens=8, **options)
        width = plain.shape[1]
        assert torch.equal(out[row * k : (row + 1) * k, :width], plain)


def test_padded_prompts_of_different_lengths(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 2)
    ids, mask = prompts(2, 9), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = 0, 0
    out = svf.generate(input_ids=ids, attention_mask=mask, experts=names, max_new_tokens=6)
    alone = svf.merged_copy(names[0]).generate(input_ids=ids[:1, 4:], max_new_tokens=6)
    assert torch.equal(out[0, 4 : 4 + alone.shape[1]], alone[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storage_formats(tiny_model, cache_dir, dtype):
    svf = wrap(tiny_model(), cache_dir, dtype=dtype)
    names = add_random_experts(svf, 4)
    ids = prompts(4)
    logits = svf(input_ids=ids, experts=names).logits
    worst = max(
        (logits[row] - svf.merged_copy(name)(input_ids=ids[row : row + 1]).logits[0]).abs().max()
        for row, name in enumerate(names)
    )
    assert worst < {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 1.0, torch.int8: 2.0}[dtype]
    for row in range(4):  # a row's bits do not depend on its neighbours
        alone = svf(input_ids=ids[row : row + 1], experts=[names[row]]).logits
        torch.testing.assert_close(alone[0], logits[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "memory"])
def test_detach_and_merge_at_one_give_the_base_bit_for_bit(tiny_model, cache_dir, family, dtype, cache):
    model = tiny_model(family, dtype)
    for parameter in model.parameters():
        parameter.data[0] = -0.0
    before, parameters = state(model), {name: id(p) for name, p in model.named_parameters()}
    ids = prompts(2)
    expected = model(input_ids=ids).logits
    svf = wrap(model, cache_dir, cache=cache)
    assert_same_state(svf.merged_copy(None), before)
    merged = svf.merged_copy(None).state_dict()
    assert all(torch.equal(merged[name].signbit(), tensor.signbit()) for name, tensor in before.items())
    svf.add_expert("e", t2.Expert.random(svf.layout))
    svf.generate(input_ids=ids, experts=["e", None], max_new_tokens=3)
    base = svf.unload()
    assert base is model
    assert_same_state(base, before)
    assert parameters == {name: id(p) for name, p in base.named_parameters()}
    assert torch.equal(base(input_ids=ids).logits, expected)
    with pytest.raises(RuntimeError, match="unloaded"):
        svf.generate(input_ids=ids, experts=["e", None])


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "memory"])
def test_merge_and_unload_is_the_model_itself_with_the_expert(tiny_model, cache_dir, cache):
    model = tiny_model()
    svf = wrap(model, cache_dir, cache=cache)
    (name,) = add_random_experts(svf, 1)
    want = svf.merged_copy(name).state_dict()
    merged = svf.merge_and_unload(name)
    assert merged is model
    assert_same_state(merged, want)
    with pytest.raises(RuntimeError, match="unloaded"):
        svf.merged_copy(name)


def test_old_method_names_warn(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    with pytest.warns(DeprecationWarning, match="merged_copy"):
        svf.merge(None)
    with pytest.warns(DeprecationWarning, match="unload"):
        assert svf.detach() is svf.model


def test_dense_weights_leave_memory(tiny_model, cache_dir):
    model = tiny_model()
    linear = model.model.layers[0].mlp.up_proj
    wrap(model, cache_dir)
    assert linear.weight.numel() == 0
    assert not any("layers" in name and p.dim() == 2 for name, p in model.named_parameters())


def test_merged_model_saves_and_loads(tiny_model, cache_dir, tmp_path):
    svf = wrap(tiny_model(), cache_dir)
    (name,) = add_random_experts(svf, 1)
    with pytest.raises(TypeError, match=r"save_pretrained: .*merged_copy\(expert\)"):
        svf.save_pretrained(tmp_path / "wrapped")
    merged = svf.merged_copy(name)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert_same_state(loaded, state(merged))


def test_experts_come_and_go_while_others_are_in_use(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 2)
    ids = prompts(2)
    expected = svf(input_ids=ids, experts=names).logits
    with svf.route(names):
        svf.remove_expert(names[0])
        svf.add_expert(names[1], t2.Expert.random(svf.layout, seed=99), replace=True)
        for i in range(40):  # grows the table and writes every free slot
            svf.add_expert(f"new{i}", t2.Expert.random(svf.layout, seed=100 + i))
        assert torch.equal(svf(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match=r"expert: .*e0"):
        svf(input_ids=ids, experts=names)
    changed = svf(input_ids=ids, experts=[names[1], "new39"]).logits
    assert not torch.allclose(changed[0], expected[1])
    plain = svf.merged_copy("new39")(input_ids=ids[1:]).logits[0]
    torch.testing.assert_close(changed[1], plain, atol=2e-3, rtol=1e-3)


def test_slots_are_given_back(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 2)
    before = svf.slot_table.in_use
    for i in range(50):
        svf(input_ids=prompts(2), experts=[{names[0]: i / 50, names[1]: 1.0}, names[0]])
    with pytest.raises(ValueError, match="nobody"):
        svf(input_ids=prompts(2), experts=[{names[0]: 1.0}, "nobody"])
    assert svf.slot_table.in_use == before == 3


def test_threads_route_on_their_own_while_a_third_changes_the_bank(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 4)
    ids = prompts(2)
    pairs = {0: names[:2], 1: names[2:]}
    expected = {i: svf.generate(input_ids=ids, experts=pair, max_new_tokens=12) for i, pair in pairs.items()}
    wrong, stop = [], threading.Event()

    def serve(i):
        for _ in range(6):
            if not torch.equal(svf.generate(input_ids=ids, experts=pairs[i], max_new_tokens=12), expected[i]):
                wrong.append(i)

    def churn():
        i = 0
        while not stop.is_set():
            svf.add_expert(f"c{i}", t2.Expert.random(svf.layout, seed=i))
            if i >= 5:
                svf.remove_expert(f"c{i - 5}")
            i += 1

    threads = [threading.Thread(target=serve, args=(i,)) for i in pairs]
    churner = threading.Thread(target=churn)
    churner.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    churner.join()
    assert not wrong


def test_gradient_reaches_z_and_matches_the_dense_model(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    ids = prompts(2)
    z = t2.Expert.random(svf.layout).z.requires_grad_()
    svf(input_ids=ids, labels=ids, experts=[z, None]).loss.backward()
    cache = FactorCache(cache_dir)
    dense = svf.merged_copy(None)
    total = 0.0
    for name, window in ((n, svf.layout.window(n)) for n in svf.layout.names):
        factors = cache.load(svf.weight_keys[name])
        weight = (factors.u * (factors.s * z.detach()[window])) @ factors.vh
        dense.get_submodule(name).weight = nn.Parameter(weight)
    logits = dense(input_ids=ids[:1]).logits
    base = svf(input_ids=ids[1:], experts=None).logits.detach()
    loss = nn.functional.cross_entropy(torch.cat([logits, base])[:, :-1].reshape(-1, 96), ids[:, 1:].reshape(-1))
    loss.backward()
    for name in svf.layout.names:
        factors = cache.load(svf.weight_keys[name])
        dw = dense.get_submodule(name).weight.grad
        expected = factors.s * torch.einsum("or,oi,ri->r", factors.u, dw, factors.vh)
        torch.testing.assert_close(z.grad[svf.layout.window(name)], expected, atol=1e-5, rtol=2e-3)
        total += float(expected.abs().sum())
    assert total > 0


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (r".*\.1\..*down_proj", {"down_proj"}),
    ],
)
def test_target_modules(tiny_model, cache_dir, targets, expected):
    svf = wrap(tiny_model(), cache_dir, target_modules=targets)
    assert {name.rpartition(".")[2] for name in svf.layout.names} == expected


def test_gpt2_attention_and_mlp_share_no_layer(tiny_model, cache_dir):
    attention = wrap(tiny_model("gpt2"), cache_dir, target_modules="attention").layout.names
    mlp = wrap(tiny_model("gpt2"), cache_dir, target_modules="mlp").layout.names
    assert len(attention) == len(mlp) == 4 and not set(attention) & set(mlp)


def test_any_module_works(cache_dir):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))
    x = torch.randn(3, 7)
    expected = model(x)
    svf = wrap(model, cache_dir)
    torch.testing.assert_close(svf(x), expected)
    (name,) = add_random_experts(svf, 1)
    assert torch.equal(svf(x, experts=[None, name, None])[0], svf(x)[0])
    assert svf(x[:0], experts=[]).shape == (0, 1)
    with pytest.raises(TypeError, match=r"model: .*generate.*Sequential"):
        svf.generate(x)


def test_lower_precision_models(tiny_model, cache_dir):
    svf = wrap(tiny_model(dtype=torch.bfloat16), cache_dir)
    assert svf.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    names = add_random_experts(svf, 2)
    logits = svf(input_ids=prompts(2), experts=names).logits
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())


def test_two_models_share_the_cache(tiny_model, cache_dir):
    wrap(tiny_model(), cache_dir)
    files = {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    wrap(copy.deepcopy(tiny_model()), cache_dir, target_modules="mlp")
    assert files == {path: path.stat().st_mtime_ns for path in cache_dir.iterdir()}


class TestBadInput:
    def test_nothing_changes_when_wrapping_fails(self, tiny_model, cache_dir, monkeypatch):
        model = tiny_model()
        before = state(model)
        original, calls = FactorCache.load, []

        def fail_late(self, key):
            calls.append(key)
            if len(calls) == 5:
                raise OSError("disk gone")
            return original(self, key)

        monkeypatch.setattr(FactorCache, "load", fail_late)
        with pytest.raises(OSError, match="disk gone"):
            wrap(model, cache_dir)
        assert_same_state(model, before)

    @pytest.mark.parametrize("targets", ["nothing_like_it", ["q_proj", "c_attn"], [], "(", [""]])
    def test_targets(self, tiny_model, cache_dir, targets):
        with pytest.raises(ValueError, match="target_modules: expected"):
            wrap(tiny_model(), cache_dir, target_modules=targets)

    def test_tied_target(self, tiny_model, cache_dir):
        model = tiny_model()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(ValueError, match=r"target_modules: .*tied with"):
            wrap(model, cache_dir)

    def test_meta_weights(self, cache_dir):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4))
        with pytest.raises(ValueError, match=r"model: .*meta"):
            wrap(model, cache_dir)

    def test_float64_weights(self, cache_dir):
        with pytest.raises(TypeError, match=r"model: .*float64"):
            wrap(nn.Sequential(nn.Linear(4, 4).double()), cache_dir)

    def test_storage_dtype(self, tiny_model, cache_dir):
        model = tiny_model()
        before = state(model)
        with pytest.raises(TypeError, match=r"dtype: .*got torch.int16"):
            wrap(model, cache_dir, dtype=torch.int16)
        assert_same_state(model, before)

    def test_not_a_module_and_wrapped_twice(self, tiny_model, cache_dir):
        with pytest.raises(TypeError, match=r"model: .*str"):
            wrap("smollm2", cache_dir)
        svf = wrap(tiny_model(), cache_dir)
        with pytest.raises(ValueError, match=r"model: .*wrapped already"):
            wrap(svf.model, cache_dir)

    def test_experts_of_another_model(self, tiny_model, cache_dir):
        svf = wrap(tiny_model(), cache_dir)
        other_weights = t2.Expert.random(wrap(tiny_model(seed=1), cache_dir).layout)
        with pytest.raises(ValueError, match=r"expert 'x': expected base weights"):
            svf.add_expert("x", other_weights)
        svf.add_expert("x", other_weights, strict=False)
        other_layout = t2.Expert.random(wrap(tiny_model("gpt2"), cache_dir).layout)
        with pytest.raises(ValueError, match=r"expert 'y': .*matrices; missing .*q_proj.*unknown .*c_attn"):
            svf.add_expert("y", other_layout, strict=False)
        fewer = t2.Expert.random(wrap(tiny_model(), cache_dir, target_modules="mlp").layout)
        with pytest.raises(ValueError, match=r"expert 'y': expected the 14 matrices"):
            svf.add_expert("y", fewer)
        assert svf.bank.names == ["x"]

    def test_experts_argument(self, tiny_model, cache_dir):
        svf = wrap(tiny_model(), cache_dir)
        add_random_experts(svf, 1)
        ids = prompts(2)
        for experts, error, text in [
            (
                ["e0"],
                ValueError,
                "experts: expected one entry for each of the 2 requests of the batch, got 1",
            ),
            (["e0", "e1"], ValueError, "expected one of .*e0.*, got 'e1'"),
            ([{"e0": 1.0, "zz": 0.5}, None], ValueError, "got 'zz'"),
            ([{"e0": float("nan")}, None], ValueError, "weights: expected finite"),
            ([{}, None], ValueError, "weights: expected at least one"),
            ([3, None], TypeError, "experts: expected a name.*got int"),
            ([torch.ones(3), None], ValueError, "experts: expected shape"),
            ([torch.full((svf.layout.R,), float("inf")), None], ValueError, "experts: expected finite"),
        ]:
            with pytest.raises(error, match=text):
                svf(input_ids=ids, experts=experts)
            with pytest.raises(error, match=text):
                svf.generate(input_ids=ids, experts=experts)
        with svf.route(["e0", None, None]), pytest.raises(ValueError, match="got 3 entries for 2 rows"):
            svf(input_ids=ids)

    def test_names(self, tiny_model, cache_dir):
        svf = wrap(tiny_model(), cache_dir)
        add_random_experts(svf, 1)
        with pytest.raises(ValueError, match=r"name: .*replace=True"):
            svf.add_expert("e0", t2.Expert.random(svf.layout))
        with pytest.raises(ValueError, match="expert: expected one of"):
            svf.remove_expert("e7")
        with pytest.raises(TypeError, match=r"expert: expected a t2.Expert, got Tensor"):
            svf.add_expert("t", torch.ones(svf.layout.R))

    def test_cache_folder_that_cannot_be_written(self, tiny_model, tmp_path):
        (tmp_path / "file").write_text("")
        model = tiny_model()
        before = state(model)
        with pytest.raises(OSError, match="file"):
            wrap(model, tmp_path / "file" / "factors")
        assert_same_state(model, before)

    def test_a_cache_that_was_damaged_is_noticed_before_anything_is_put_back(self, tiny_model, cache_dir):
        svf = wrap(tiny_model(), cache_dir)
        ids = prompts(2)
        expected = svf(input_ids=ids).logits
        last = cache_dir / f"{list(svf.weight_keys.values())[-1]}.safetensors"
        whole = last.read_bytes()
        last.write_bytes(whole[:-8])
        for call in (svf.unload, lambda: svf.merged_copy(None)):
            with pytest.raises(t2.FileFormatError, match=last.name):
                call()
        assert torch.equal(svf(input_ids=ids).logits, expected)
        last.write_bytes(whole)
        svf.unload()


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: data.replace(b"t2-factors", b"t2-factory")])
def test_damaged_factor_files_change_nothing(tiny_model, cache_dir, damage):
    ids = prompts(2)
    svf = wrap(tiny_model(), cache_dir)
    expected = svf(input_ids=ids).logits
    file = cache_dir / f"{next(iter(svf.weight_keys.values()))}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(RuntimeWarning, match=file.name):
        assert torch.equal(wrap(tiny_model(), cache_dir)(input_ids=ids).logits, expected)


def test_factors_of_another_matrix_are_not_used(tiny_model, cache_dir):
    ids = prompts(2)
    svf = wrap(tiny_model(), cache_dir)
    expected = svf(input_ids=ids).logits
    mine, other = (cache_dir / f"{svf.weight_keys[f'model.layers.{i}.mlp.up_proj']}.safetensors" for i in (0, 1))
    mine.write_bytes(other.read_bytes())
    with pytest.warns(RuntimeWarning, match=mine.name):
        assert torch.equal(wrap(tiny_model(), cache_dir)(input_ids=ids).logits, expected)
    svf.unload()


def test_autocast_and_inference_mode(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 2)
    with torch.inference_mode():
        exact = svf(input_ids=prompts(2), experts=names).logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = svf(input_ids=prompts(2), experts=names).logits
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_experts_added_in_inference_mode_do_not_spoil_training(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    with torch.inference_mode():
        names = add_random_experts(svf, 20)  # grows the table
        svf(input_ids=prompts(2), experts=names[:2])
    embeddings = svf.model.get_input_embeddings()(prompts(2)).detach().requires_grad_()
    svf(inputs_embeds=embeddings, experts=names[-2:]).logits.sum().backward()
    assert bool(torch.isfinite(embeddings.grad).all()) and embeddings.grad.abs().sum() > 0


def test_wrapped_model_can_be_cast(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir, dtype=torch.int8)
    names = add_random_experts(svf, 2)
    svf.to(torch.bfloat16)
    assert svf.slot_table.table.dtype == torch.float32
    logits = svf(input_ids=prompts(2), experts=names).logits
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_layers_beside_the_targets_are_packed_and_given_back(tiny_model, cache_dir, family):
    model = tiny_model(family)
    before = copy.deepcopy(model)
    logits = before(input_ids=prompts(3)).logits
    svf = wrap(model, cache_dir, target_modules="mlp")
    assert not any(type(m) in (nn.Linear, Conv1D) for m in svf.model.modules())
    torch.testing.assert_close(svf(input_ids=prompts(3)).logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(svf.merged_copy(None)(input_ids=prompts(3)).logits, logits)
    base = svf.unload()
    assert {k: v.data_ptr() for k, v in base.named_parameters()}.keys() == dict(before.named_parameters()).keys()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters(), strict=True))
    assert torch.equal(base(input_ids=prompts(3)).logits, logits)


def test_packing_can_be_left_off(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir, target_modules="mlp", pack_others=False)
    assert type(svf.model.lm_head) is nn.Linear and type(svf.model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_merged_model_keeps_its_tied_embedding(tiny_model, cache_dir):
    svf = wrap(tiny_model("gpt2"), cache_dir)
    merged = svf.merged_copy(t2.Expert.random(svf.layout, seed=1))
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert merged.lm_head.weight is not svf.model.transformer.wte.weight


def test_layers_that_share_an_input_run_as_one_call_with_the_same_bits(tiny_model, cache_dir, monkeypatch):
    svf = wrap(tiny_model(), cache_dir)
    names = add_random_experts(svf, 3)
    calls = []
    group = FactoredGroup.linear_unchecked
    monkeypatch.setattr(
        FactoredGroup, "linear_unchecked", lambda self, *a: calls.append(len(self.weights)) or group(self, *a)
    )
    with torch.no_grad():
        together = svf(input_ids=prompts(3), experts=names).logits
    assert calls == [3, 2] * 2
    trained = svf(input_ids=prompts(3), experts=[svf.bank[name].z.clone().requires_grad_() for name in names]).logits
    assert len(calls) == 4 and trained.requires_grad
    assert torch.equal(together, trained.detach())


def test_a_wrong_guess_about_shared_inputs_costs_one_call(tiny_model, cache_dir):
    svf = wrap(tiny_model(), cache_dir)
    attention = svf.model.model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    x, other = (torch.randn(2, 5, q.in_features, generator=torch.Generator().manual_seed(i)) for i in range(2))
    with torch.no_grad():
        of_other, of_x = k(other), k(x)
        q(x)
        assert torch.equal(k(other), of_other)  # not what q's call prepared
        x.zero_()
        assert not torch.equal(k(x), of_x)  # nor for a tensor that was written to
        assert torch.equal(q(other), q(other.clone())) and q.shared_input.linear(q, x, svf.router.current) is None


def test_bf16_products_are_close_and_shared_by_every_layer(tiny_model, cache_dir):
    plain = wrap(tiny_model(), cache_dir, dtype=torch.bfloat16)
    fast = wrap(tiny_model(), cache_dir, dtype=torch.bfloat16, bf16_products=True)
    a, b = (svf(input_ids=prompts(3)).logits for svf in (plain, fast))
    assert (a - b).norm() / a.norm() < 0.05
    flags = {
        (m.weight if isinstance(m, RoutedLinear) else m.packed).bf16_products
        for m in fast.model.modules()
        if isinstance(m, RoutedLinear | PackedLinear)
    }
    assert flags == {True}
