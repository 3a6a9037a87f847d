"""Models whose layers another library quantised."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import t2
from benchmarks.serving import quantized_checkpoints
from t2.model.layers import RoutedLinear
from t2.weights.quantized import QuantizedBase, dequantized, is_quantized, why_no_matrix
from t2.weights.targets import plain_targets, select_targets, why_unsuitable
from tests.t2.toy import toy_model

IDS = torch.tensor([[5, 6, 7, 8], [6, 7, 8, 9], [9, 8, 7, 6]])


class EightBits(nn.Module):
    """A layer as libraries have them: codes and scales of its own, and a product that dequantises."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach().float() / scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix(x.dtype), self.bias)


class Rounding(EightBits):
    """The same with activations in 8 bits too, a scale a row."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((x / step).round() * step)


class Batched(EightBits):
    """Activations in 8 bits with one scale for all rows: a row's outputs depend on the others'."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax().clamp(min=1e-9) / 15
        return super().forward((x / step).round() * step)


class ForInference(EightBits):
    """Its kernel has no gradient, and says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x.sum()


class InTraining(EightBits):
    """Has one in training mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else x.detach()) + 0 * x.sum()


class Curved(EightBits):
    """No linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def quantise(model: nn.Module, kind=EightBits, skip=("lm_head",)) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(skip):
            model.set_submodule(name, kind(module))
    return model


def wrapped(kind=EightBits, **options) -> t2.SVFModel:
    return t2.SVFModel(quantise(toy_model(), kind), t2.SVFConfig(progress=False, cache=False) if not options
                       else t2.SVFConfig(progress=False, **{"cache": False} | options))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (577, 31), (64, 1031)])
def test_the_matrix_is_the_one_that_the_layer_multiplies_by(dtype, bias, shape):
    torch.manual_seed(0)
    layer = EightBits(nn.Linear(shape[1], shape[0], bias=bias)).to(dtype)
    before = None if layer.bias is None else layer.bias.clone()
    assert is_quantized(layer) and why_no_matrix(layer, dtype) is None
    assert torch.equal(dequantized(layer, dtype), layer.matrix(dtype))
    assert (layer.bias is None) == (before is None) and (before is None or torch.equal(layer.bias, before))


def test_layers_that_round_their_inputs_have_one_and_others_none():
    torch.manual_seed(0)
    layer = Rounding(nn.Linear(300, 40))
    assert torch.equal(dequantized(layer, torch.float32), layer.matrix(torch.float32))
    assert "computes no W x + b" in why_no_matrix(Curved(nn.Linear(300, 40)), torch.float32)
    with pytest.raises(ValueError, match="got a Curved that does not"):
        dequantized(Curved(nn.Linear(300, 40)), torch.float32)
    fails = EightBits(nn.Linear(8, 8))
    fails.forward = lambda x: 1 / 0
    assert "ZeroDivisionError" in why_no_matrix(fails, torch.float32)
    assert not is_quantized(nn.Linear(3, 3)) and not is_quantized(nn.Linear(3, 3).double())
    assert not is_quantized(nn.Embedding(3, 3)) and not is_quantized(nn.Sequential(EightBits(nn.Linear(3, 3))))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("form", [{"form": "delta", "support": 4}, {}], ids=["delta", "factored"])
def test_a_batch_of_experts_is_each_built_in(form, cache, tmp_path):
    plain = quantise(toy_model())
    with torch.no_grad():
        base = plain(input_ids=IDS).logits
    svf = wrapped(cache=cache, cache_dir=tmp_path, **form)
    assert svf.coverage.share == 1.0
    expert = t2.Expert.random(svf.layout, std=0.1, seed=1)
    if svf.support is not None:
        z = torch.ones_like(expert.z)
        z[svf.support] = expert.z[svf.support]
        expert = t2.Expert(z, svf.layout)
    svf.add_expert("one", expert)
    with torch.no_grad():
        mixed = svf(input_ids=IDS, experts=[None, "one", {"one": 1.0}]).logits
        (torch.testing.assert_close(mixed[0], base[0], rtol=0, atol=0) if form
         else torch.testing.assert_close(mixed[0], base[0], rtol=1e-3, atol=1e-4))  # fmt: skip
        with pytest.warns(UserWarning, match="quantised matrices are plain ones of torch.float32 now"):
            merged = svf.merged_copy("one")
        assert not any(map(is_quantized, merged.modules()))
        torch.testing.assert_close(mixed[1], merged(input_ids=IDS).logits[1], rtol=1e-3, atol=1e-4)
    model = svf.unload()
    assert sum(map(is_quantized, model.modules())) == sum(map(is_quantized, plain.modules())) > 0
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base)


def test_z_is_trained_on_a_quantised_base():
    svf = wrapped(form="delta", support=4)
    z = svf.start_training()
    loss = svf(input_ids=IDS).logits.square().mean()
    loss.backward()
    assert z.grad is not None and z.grad.shape == svf.support.shape and z.grad.abs().min() > 0
    trained = svf.finish_training()
    assert torch.equal(trained.z, torch.ones(svf.layout.R))


@pytest.mark.parametrize(("kind", "way"), [(EightBits, "own"), (InTraining, "training"), (ForInference, "dequantised")])
def test_gradients_are_right_whatever_the_layers_own_are(kind, way):
    def gradient(kind):
        svf = wrapped(kind, form="delta", support=4).eval()
        z = svf.start_training()
        svf(input_ids=IDS).logits.square().mean().backward()
        bases = [module for module in svf.modules() if isinstance(module, QuantizedBase)]
        assert bases and not any(base.module.training for base in bases)
        return z.grad, {base._backward for base in bases}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, ways = gradient(kind)
    assert way in ways and ways <= {way, None}  # nothing that has a gradient comes before the first layers
    torch.testing.assert_close(found, gradient(EightBits)[0], rtol=1e-4, atol=1e-6)


def test_a_layer_without_a_gradient_says_what_it_costs():
    base = QuantizedBase(ForInference(nn.Linear(7, 5)))
    x = torch.randn(3, 7, requires_grad=True)
    with pytest.warns(UserWarning, match="ForInference gives no right gradient of its input"):
        y = base(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, base.module.matrix(torch.float32).sum(0).expand(3, 7))


def test_a_factored_model_takes_a_support_and_moves_with_its_base():
    svf = wrapped()
    with torch.no_grad():
        base = quantise(toy_model())(input_ids=IDS).logits
        svf.take_support(torch.arange(svf.layout.R)[::5])
        assert torch.equal(svf(input_ids=IDS).logits, base)
    names = dict(svf.named_modules())
    assert any(isinstance(module, EightBits) for module in names.values())


def test_hooks_of_a_quantised_layer_run_once_and_see_the_expert():
    model = quantise(toy_model())
    name, layer = next((name, module) for name, module in model.named_modules() if is_quantized(module))
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False, form="delta", support=4))
    z = torch.ones(svf.layout.R)
    z[svf.support] = 1.5
    seen.clear()
    with torch.no_grad():
        svf(input_ids=IDS, experts=[None, z, None])
    (y,) = seen
    with torch.no_grad():
        svf(input_ids=IDS)
    assert torch.equal(y[0], seen[1][0]) and not torch.equal(y[1], seen[1][1])
    assert isinstance(svf.factored_layers[name], RoutedLinear)


def test_a_layer_that_is_not_linear_stays_and_is_named():
    model = quantise(toy_model())
    name = next(name for name, module in model.named_modules() if is_quantized(module))
    model.set_submodule(name, Curved(toy_model().get_submodule(name)))
    with pytest.warns(UserWarning, match="is quantised and computes no W x"):
        svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False))
    assert name in svf.left_out and name not in svf.layout.names


def test_what_needs_plain_weights_says_so():
    model = quantise(toy_model())
    assert select_targets(model, "all-linear")
    with pytest.raises(ValueError, match=r"expected plain weights, got layers that are quantised.*EightBits"):
        plain_targets(model, "all-linear")


def test_the_rest_of_a_plain_model_is_as_before():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False, cache=False))
    assert svf.coverage.share == 1.0 and not any(layer.keeps_module for layer in svf.factored_layers.values())


def give_forward(layer, product):
    """What libraries do to plain layers: a forward of the instance."""
    plain = type(layer).forward
    layer.forward = lambda x: product(plain, layer, x)


def rounded(plain, layer, x):
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127.5
    return plain(layer, (x / step).round().clamp(-128, 127) * step)


@torch.no_grad()
def test_plain_layers_that_were_given_another_forward_keep_it():
    """As compressed-tensors does for checkpoints whose activations have 8 bits."""
    model = toy_model()
    layers = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name
    ]
    for layer in layers:
        give_forward(layer, rounded)
    assert all(is_quantized(layer) for layer in layers)
    want = model(input_ids=IDS).logits
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False, form="delta", support=4))
    assert len(svf.layout.names) == len(layers)
    torch.testing.assert_close(svf(input_ids=IDS, experts=[None] * 3).logits, want)
    weights = [layer.weight.clone() for layer in layers]
    assert all(torch.equal(dequantized(layer, torch.float32), w) for layer, w in zip(layers, weights, strict=True))
    assert torch.equal(svf.unload()(input_ids=IDS).logits, want)


@torch.no_grad()
def test_layers_that_are_unpacked_at_the_first_call_of_their_model_are_ready_before_it_is_wrapped():
    """As compressed-tensors loads a checkpoint: integers, no weight, and a hook of the model."""
    model, want = toy_model(), toy_model()(input_ids=IDS).logits
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    del layers["lm_head"]
    kept = {name: layer._parameters.pop("weight") for name, layer in layers.items()}
    for layer in layers.values():
        layer.register_buffer("packed", torch.zeros(3, dtype=torch.int32))
    calls = []

    def unpack(module, inputs):
        calls.append(module)
        for name, layer in layers.items():
            layer.weight = kept[name]
            del layer._buffers["packed"]
        hook.remove()

    hook = model.register_forward_pre_hook(unpack)
    assert all(
        is_quantized(layer) and "AttributeError" in why_no_matrix(layer, torch.float32) for layer in layers.values()
    )
    svf = t2.SVFModel(model, t2.SVFConfig(progress=False, cache=False))
    assert len(calls) == 1 and len(svf.layout.names) == len(layers)
    torch.testing.assert_close(svf(input_ids=IDS, experts=[None] * 3).logits, want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_checkpoint_of_fp8_is_dequantised_and_a_merged_model_saved_as_it_is(tmp_path):
    """transformers itself quantises a dequantised model again when it is saved, and loses the scales."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path / "plain")
    folder = quantized_checkpoints.fp8(tmp_path / "plain", tmp_path / "fp8")
    svf = t2.SVFModel(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), t2.SVFConfig(progress=False, cache=False)
    )
    expert = t2.Expert.random(svf.layout, 0.2, 0)
    want = svf(input_ids=IDS, experts=[expert.z] * 3).logits
    svf.merged_copy(expert.z).save_pretrained(tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)(input_ids=IDS).logits
    assert (found.float() - want.float()).abs().max() < 0.03 * want.abs().max()


@torch.no_grad()
def test_a_forward_that_adds_something_is_part_of_the_matrix_and_hooks_are_nothing():
    layer = nn.Linear(12, 9)
    a, b = torch.randn(9, 2), torch.randn(2, 12)
    give_forward(layer, lambda plain, layer, x: plain(layer, x) + x @ b.T @ a.T)
    assert is_quantized(layer) and why_no_matrix(layer, torch.float32) is None
    torch.testing.assert_close(dequantized(layer, torch.float32), layer.weight + a @ b, rtol=1e-4, atol=1e-4)
    for kind, sizes in ((nn.Linear, (12, 9)), (Conv1D, (9, 12))):
        hooked = kind(*sizes)
        give_forward(hooked, lambda plain, layer, x: plain(layer, x))
        assert not is_quantized(hooked) and why_unsuitable(hooked) is None
        give_forward(hooked, lambda plain, layer, x: plain(layer, x).relu())
        assert why_unsuitable(hooked, torch.float32) is not None


def test_layers_that_look_at_the_whole_batch_are_wrapped_with_a_warning():
    with pytest.warns(UserWarning, match="give a request other outputs beside other requests"):
        svf = wrapped(Batched, form="delta", support=4)
    with torch.no_grad():
        assert torch.equal(svf(input_ids=IDS).logits, quantise(toy_model(), Batched)(input_ids=IDS).logits)
