"""SVF as a method of PEFT: the behaviour of LoRA where it makes sense, and the experts of this package."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import t2
from t2.integrations.peft import SVFConfig, SVFLinear, expert_of, layout_of, load_expert, support_by_module
from tests.t2.tiny_lm import CONFIGS, assert_same_state, prompts, state, wrap

METHODS = {
    "svf": lambda **options: SVFConfig(cache=False, **{"target_modules": "all-linear"} | options),
    "svf, support": lambda **options: SVFConfig(cache=False, support=5, **{"target_modules": "all-linear"} | options),
    "lora": lambda **options: LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear"} | options),
}
OURS = ("svf", "svf, support")


class Custom(nn.Module):
    """Linear layers of several kinds, and one that no method knows."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(9, 14), Conv1D(11, 14), nn.Linear(11, 3, bias=False)
        self.norm = nn.LayerNorm(11)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.conv(torch.tanh(self.first(x))))))


def changed(model, names=("default",), seed=0):
    """Gives adapters random values."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SVFLinear):
                for name in names:
                    offset = module.svf_offset[name]
                    offset.copy_(0.3 * torch.randn(offset.shape, generator=g))
    return model


def decoder(model, method="svf", names=("default",), **options):
    model.eval()
    peft = get_peft_model(model, METHODS[method](**options), adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, METHODS[method](**options))
    return changed(peft, names).eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_custom_model_starts_as_it_was_learns_and_merges(method):
    torch.manual_seed(0)
    model = Custom()
    x, before = torch.randn(7, 9), copy.deepcopy(model)
    peft = get_peft_model(model, METHODS[method](target_modules=["first", "conv", "last"]))
    if method in OURS:
        torch.testing.assert_close(peft(x), before(x), atol=1e-5, rtol=1e-5)
    trainable = [name for name, p in peft.named_parameters() if p.requires_grad]
    assert trainable and all("svf_offset" in name or "lora_" in name for name in trainable)
    optimizer = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = (peft(x) - 1).square().mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    learnt = peft(x)
    with peft.disable_adapter():
        assert torch.equal(peft(x), before(x))
    peft.merge_adapter()
    torch.testing.assert_close(peft(x), learnt, atol=1e-5, rtol=1e-4)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(x), before(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peft(x), learnt, atol=1e-5, rtol=1e-4)
    merged = copy.deepcopy(peft).merge_and_unload()
    torch.testing.assert_close(merged(x), learnt, atol=1e-5, rtol=1e-4)
    assert type(merged.first) is nn.Linear and type(merged.conv) is Conv1D
    assert_same_state(peft.unload(), state(before)) if method in OURS else None


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("family", CONFIGS)
def test_decoders_as_merged(tiny_model, family, method):
    model = tiny_model(family)
    before = state(model)
    peft = decoder(model, method, ("a", "b"))
    ids = prompts(3)
    base = peft.get_base_model()
    layers = [m for m in base.modules() if isinstance(m, SVFLinear)]
    assert len(layers) == sum(isinstance(m, nn.Linear | Conv1D) for m in copy.deepcopy(peft).unload().modules()) - 1
    peft.set_adapter("b")
    logits = peft(input_ids=ids).logits
    merged = copy.deepcopy(peft).merge_and_unload()
    torch.testing.assert_close(logits, merged(input_ids=ids).logits, atol=2e-3, rtol=1e-3)
    out = peft.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, merged.generate(input_ids=ids, max_new_tokens=5, do_sample=False))
    assert_same_state(peft.unload(), before)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches(tiny_model, method):
    peft = decoder(tiny_model("llama"), method, ("a", "b", "c"))
    ids, names = prompts(5), ["b", "__base__", "c", "a", "b"]
    mixed = peft(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with peft.disable_adapter():
                alone = peft(input_ids=ids[row : row + 1]).logits
        else:
            peft.set_adapter(name)
            alone = peft(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row], alone[0], atol=2e-3, rtol=1e-3)
    assert (mixed[0] - mixed[2]).abs().max() > 0.01
    for beams in (1, 3):
        out = peft.generate(
            input_ids=ids, adapter_names=names, max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None
        )
        peft.set_adapter("c")
        alone = peft.generate(input_ids=ids[2:3], max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None)
        assert torch.equal(out[2], alone[0])
    with pytest.raises(ValueError, match=r"non-existing adapter|adapter_names: expected adapters of this model"):
        peft(input_ids=ids, adapter_names=["a", "nobody", "b", "c", "a"])
    with pytest.raises(ValueError, match="adapter_names"):
        peft(input_ids=ids, adapter_names=names[:3])
    with pytest.raises(ValueError, match="training mode"):
        peft.train()(input_ids=ids, adapter_names=names)


def test_a_mixed_batch_sees_changes_of_its_adapters(tiny_model):
    peft = decoder(tiny_model("llama"), "svf", ("a", "b"))
    ids, names = prompts(2), ["a", "b"]
    first = peft(input_ids=ids, adapter_names=names).logits
    assert torch.equal(peft(input_ids=ids, adapter_names=names).logits, first)
    changed(peft, ("b",), seed=5)
    second = peft(input_ids=ids, adapter_names=names).logits
    assert torch.equal(second[0], first[0]) and not torch.equal(second[1], first[1])


def test_mixed_batches_of_encoder_decoders_with_beams():
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    peft = decoder(T5ForConditionalGeneration(T5Config(**sizes)), "svf", ("a", "b"))
    ids, names = prompts(3).clamp(max=63), ["a", "b", "__base__"]
    for beams in (1, 2):
        limits = dict(max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None)
        out = peft.generate(input_ids=ids, adapter_names=names, **limits)
        peft.set_adapter("b")
        assert torch.equal(out[1], peft.generate(input_ids=ids[1:2], **limits)[0])


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(tiny_model, tmp_path, method):
    model = tiny_model("qwen2")
    plain = copy.deepcopy(model)
    peft = decoder(model, method, ("default", "other"))
    ids = prompts(3)
    logits = {}
    for name in ("default", "other"):
        peft.set_adapter(name)
        logits[name] = peft(input_ids=ids).logits
    peft.save_pretrained(tmp_path)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 and json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    if method in OURS:
        numbers = sum(m.svf_offset["default"].numel() for m in peft.modules() if isinstance(m, SVFLinear))
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(t.numel() for t in saved.values()) == numbers and all("svf_offset" in name for name in saved)
        assert isinstance(PeftConfig.from_pretrained(tmp_path), SVFConfig)
    again = PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, logits["default"], atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "other", "second")
    again.set_adapter("second")
    torch.testing.assert_close(again(input_ids=ids).logits, logits["other"], atol=1e-6, rtol=0)
    lazy = PeftModel.from_pretrained(again.unload(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(lazy(input_ids=ids).logits, logits["default"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", OURS)
def test_adapters_come_go_and_add_up(tiny_model, method):
    peft = decoder(tiny_model("llama"), method, ("a", "b"))
    ids = prompts(2)
    total, trainable = peft.get_nb_trainable_parameters()[1], peft.get_nb_trainable_parameters()[0]
    assert 0 < trainable < total / 5
    peft.add_weighted_adapter(["a", "b"], [0.25, 0.75], "mixed")
    layer = next(m for m in peft.modules() if isinstance(m, SVFLinear))
    want = 0.25 * layer.svf_offset["a"] + 0.75 * layer.svf_offset["b"]
    torch.testing.assert_close(layer.svf_offset["mixed"], want)
    peft.set_adapter("mixed")
    mixed = peft(input_ids=ids).logits
    merged = copy.deepcopy(peft).merge_and_unload(adapter_names=["mixed"])
    torch.testing.assert_close(mixed, merged(input_ids=ids).logits, atol=2e-3, rtol=1e-3)
    peft.base_model.set_adapter(["a", "b"])  # several at once: their changes add up
    both = peft(input_ids=ids).logits
    merged = copy.deepcopy(peft).merge_and_unload(adapter_names=["a", "b"])
    torch.testing.assert_close(both, merged(input_ids=ids).logits, atol=2e-3, rtol=1e-3)
    peft.set_adapter("a")
    peft.delete_adapter("mixed")
    assert "mixed" not in layer.svf_offset
    for bad, text in (
        ((["a", "b"], [1.0], "c"), "weights: expected one for each of the 2 adapters, got 1"),
        ((["a", "x"], [1.0, 1.0], "c"), "adapters: expected adapters of this model, got 'x'"),
        ((["a"], [1.0], "b"), "adapter_name: expected a new name, got 'b'"),
    ):
        with pytest.raises(ValueError, match=text):
            peft.add_weighted_adapter(*bad)


@pytest.mark.parametrize("method", OURS)
def test_modules_to_save_checkpointing_and_casts(tiny_model, method, tmp_path):
    model = tiny_model("llama").train()
    peft = get_peft_model(model, METHODS[method](target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]))
    changed(peft)
    ids = prompts(2)

    def gradients():
        peft.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in peft.parameters() if p.requires_grad]

    plain = gradients()
    assert any(p.shape == (96, 32) for p in plain)
    peft.enable_input_require_grads()
    peft.base_model.model.gradient_checkpointing_enable()
    for one, two in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    peft.save_pretrained(tmp_path)
    assert any("lm_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        exact, half = peft(input_ids=ids).logits, copy.deepcopy(peft).to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = peft(input_ids=ids).logits
        for rounded in (mixed, half(input_ids=ids).logits):
            assert rounded.dtype == torch.bfloat16
            assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("method", OURS)
def test_a_model_in_bfloat16_keeps_small_changes(tiny_model, method):
    """z - 1 is what is stored: rounding z itself to 8 bits near 1 would lose changes below 0.4%."""
    peft = get_peft_model(tiny_model("llama").to(torch.bfloat16), METHODS[method](), autocast_adapter_dtype=False)
    layer = next(m for m in peft.modules() if isinstance(m, SVFLinear))
    assert layer.svf_offset["default"].dtype == torch.bfloat16
    with torch.no_grad():
        layer.svf_offset["default"].fill_(1e-3)
    s = layer.svf_factors.s
    got = layer._scales(layer.svf_offset["default"])
    want = s * 1.001 if layer.components is None else s * 0.001
    torch.testing.assert_close(got, want, rtol=5e-3 if layer.components is not None else 1e-5, atol=0)


@pytest.mark.parametrize("chosen", [None, 6])
def test_experts_of_this_package(tiny_model, cache_dir, chosen):
    model = tiny_model("llama")
    svf = wrap(copy.deepcopy(model), cache_dir, **({} if chosen is None else {"form": "delta", "support": chosen}))
    z = torch.ones(svf.layout.R)
    own = torch.arange(len(z)) if svf.support is None else svf.support
    z[own] += 0.3 * torch.randn(len(own), generator=torch.Generator().manual_seed(0))
    expert = t2.Expert(z, svf.layout)
    svf.add_expert("e", expert)
    support = None if chosen is None else support_by_module(chosen, svf.layout)
    peft = get_peft_model(model, SVFConfig(cache=False, support=support)).eval()
    assert layout_of(peft) == svf.layout
    load_expert(peft, expert, "mine")
    peft.set_adapter("mine")
    ids = prompts(2)
    torch.testing.assert_close(peft(input_ids=ids).logits, svf(input_ids=ids, experts="e").logits, atol=1e-3, rtol=1e-3)
    back = expert_of(peft, "mine")
    torch.testing.assert_close(back.z, expert.z, atol=1e-6, rtol=0)
    svf.add_expert("back", back)
    if chosen is not None:
        with pytest.raises(ValueError, match="expert: expected z = 1 off the support"):
            load_expert(peft, t2.Expert.random(svf.layout), "mine")
    with pytest.raises(ValueError, match="adapter_name: expected one of"):
        expert_of(peft, "nobody")
    other = t2.Expert(expert.z, t2.Layout(svf.layout.names, svf.layout.ranks, "0" * 64))
    with pytest.raises(ValueError, match="expert: expected base weights"):
        load_expert(peft, other, "mine")


def test_factors_are_kept(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("T2_CACHE", str(tmp_path))
    get_peft_model(tiny_model("llama"), SVFConfig())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 14
    get_peft_model(tiny_model("llama"), SVFConfig())
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"factor_dtype": "int3"}, ValueError, "factor_dtype: expected one of float32"),
        ({"support": 0}, ValueError, "support: expected None, an integer >= 1"),
        ({"support": {"x": [0]}}, ValueError, "support: expected components of model.layers.0"),
        ({"target_modules": ["embed_tokens"]}, ValueError, "target_modules: expected linear layers, got model.embed"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern: expected layers_to_transform"),
    ],
)
def test_options_are_checked(tiny_model, options, error, text):
    with pytest.raises(error, match=text):
        get_peft_model(tiny_model("llama"), SVFConfig(**{"cache": False} | options))


def test_layers_of_other_methods_and_of_quantised_models_are_refused(tiny_model):
    with_lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(ValueError, match=r"expected linear layers, got model.layers.0.self_attn.q_proj: a Linear"):
        get_peft_model(with_lora, SVFConfig(cache=False, target_modules=["q_proj"]))

    class Quantised(nn.Linear):
        pass

    model = tiny_model("llama")
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.__class__ = Quantised
    q_proj.weight = nn.Parameter(q_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got model.layers.0.self_attn.q_proj: Quantised is no plain nn.Linear"):
        get_peft_model(model, SVFConfig(cache=False, target_modules=["q_proj"]))


def test_adapters_of_different_modules(tiny_model):
    peft = get_peft_model(tiny_model("llama"), SVFConfig(cache=False, target_modules=["q_proj"]), adapter_name="a")
    peft.add_adapter("b", SVFConfig(cache=False, target_modules=r".*\.(q|down)_proj"))
    layers = [m for m in peft.modules() if isinstance(m, SVFLinear)]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.svf_offset.values():
                parameter.fill_(0.5)
    peft.add_weighted_adapter(["a", "b"], [1.0, 2.0], "both")
    assert {(layer.name.rpartition(".")[2], float(layer.svf_offset["both"][0])) for layer in layers} == {
        ("q_proj", 1.5),
        ("down_proj", 1.0),
    }
    expert = t2.Expert.random(layout_of(peft))
    before = layers[0].svf_offset["a"].clone()
    with pytest.raises(ValueError, match=r"adapter_name: expected an adapter with .*down_proj, got 'a' without it"):
        load_expert(peft, expert, "a")
    assert torch.equal(layers[0].svf_offset["a"], before)
    load_expert(peft, expert, "new")
    torch.testing.assert_close(expert_of(peft, "new").z, expert.z, atol=1e-6, rtol=0)


def test_adapters_of_a_model_share_its_factors(tiny_model):
    peft = get_peft_model(tiny_model("llama"), SVFConfig(cache=False, support=4))
    with pytest.raises(ValueError, match=r"peft_config: expected .*'support': 4.* got .*'support': 5"):
        peft.add_adapter("other", SVFConfig(cache=False, support=5))
    with pytest.raises(TypeError, match="model: expected a PeftModel of the method SVF"):
        layout_of(get_peft_model(tiny_model("llama"), LoraConfig(r=2)))
