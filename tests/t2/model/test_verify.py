"""A wrap proves itself: what fails the probe stays dense or is refused, and the model is as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import t2
from t2.model.verify import VerificationError, distance
from t2.weights.targets import select_targets, unsuitable_layers
from tests.families.checks import off, prompts
from tests.families.tiny import spread, tiny_model

IDS = torch.randint(3, 96, (4, 8), generator=torch.Generator().manual_seed(0))


def wrap(model, example_inputs=None, **options):
    return t2.SVFModel(model, t2.SVFConfig(cache=False, progress=False, **options), example_inputs=example_inputs)


def with_experts(svf, count=4):
    for i in range(count):
        svf.add_expert(f"e{i}", t2.Expert.random(svf.layout, std=0.3, seed=i))
    return [f"e{i}" for i in range(count)]


def mixed_off_merged(svf):
    """How far a batch of four experts is off the merged models."""
    names, batch = with_experts(svf), prompts()
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        got = svf(**batch, experts=names).logits
        want = torch.stack([svf.merged_copy(name)(**batch).logits[row] for row, name in enumerate(names)])
    return off(got[kept], want[kept])


@pytest.fixture
def quiet():
    """Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Block(nn.Module):
    """An embedding, a linear layer in some function, and a second one."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(96, 32), layer or nn.Linear(32, 32), nn.Linear(32, 96)
        self.function = function

    def forward(self, ids):
        return self.head(self.function(self.linear, self.embed(ids)))


def block(function, layer=None):
    torch.manual_seed(0)
    return spread(Block(function, layer)).eval()


def test_an_ordinary_model_is_wrapped_in_silence(quiet):
    model = tiny_model("llama").train()
    random = torch.get_rng_state()
    svf = wrap(model)
    assert torch.equal(torch.get_rng_state(), random) and all(module.training for module in model.modules())
    assert not svf.left_out and svf.coverage.share == 1 and "%" not in svf.extra_repr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_every_storage_passes(quiet, dtype, storage):
    wrap(tiny_model("llama").to(storage), dtype=dtype)


@pytest.mark.parametrize("family", ["falcon", "glm_moe_dsa", "gemma4_text", "opt"])
def test_families_with_ways_of_their_own_are_the_merged_models(family):
    svf = wrap(tiny_model(family))
    assert not svf.left_out and mixed_off_merged(svf) < 1e-4


def test_a_weight_that_its_parent_reads_stays_dense():
    with pytest.warns(UserWarning, match=r"layers\.0\.mixer\.dt_proj.*not called"):
        svf = wrap(tiny_model("mamba"))
    assert list(svf.left_out) == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert not svf.left_out.keys() & set(svf.layout.names)
    assert mixed_off_merged(svf) < 1e-4


def test_experts_that_gather_tokens_stay_dense():
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    parts = {"layers": 1, "attention_heads": 4, "ffn_dim": 96, "sparse_step": 1}
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in parts.items()}
    config = NllbMoeConfig(vocab_size=96, d_model=64, num_experts=4, expert_capacity=64, dropout=0.0, **sizes)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"experts\.expert_0\.fc1"):
        svf = wrap(spread(NllbMoeForConditionalGeneration(config)).eval())
    assert svf.left_out and all(".experts." in name for name in svf.left_out)
    names = with_experts(svf)
    with torch.no_grad():
        got = svf(input_ids=IDS, decoder_input_ids=IDS, experts=names).logits
        want = [svf.merged_copy(n)(input_ids=IDS, decoder_input_ids=IDS).logits[row] for row, n in enumerate(names)]
    assert off(got, torch.stack(want)) < 1e-4


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (
            lambda: nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval(),
            "linear2, linear1: .*FactoredWeight",
        ),
        (lambda: tiny_model("xlnet"), r"ff\.layer_1.*: the first dimension of its input is not that of the batch"),
        (lambda: block(lambda linear, x: x + linear(x.mean(0, keepdim=True))), "rows depend on the rest of the batch"),
        (lambda: tiny_model("rwkv"), "depend on the other requests"),
        (lambda: block(lambda linear, x: linear(x) if type(linear) is nn.Linear else x), r"with z = 1 .*off by"),
    ],
    ids=["fast path", "sequence first", "averages", "state of other rows", "depends on the class"],
)
def test_models_that_would_answer_otherwise_are_refused_and_unchanged(make, cause):
    model = make()
    wrap_plainly(model)  # RWKV rescales its weights in its first forward pass
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(VerificationError, match=cause):
        wrap(model)
    after = model.state_dict()
    assert [type(module) for module in model.modules()] == kinds and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def wrap_plainly(model):
    if type(model).__name__ == "RwkvForCausalLM":
        with torch.no_grad():
            model(input_ids=IDS)


@pytest.mark.parametrize(
    "function",
    [
        lambda linear, x: linear(x.transpose(0, 1)).transpose(0, 1),
        lambda linear, x: x + linear(torch.ones(x.shape[1], x.shape[2])),
        lambda linear, x: linear(x.roll(1, 0)).roll(-1, 0),
        lambda linear, x: x @ linear.weight.T,
        lambda linear, x: linear(x) @ linear.weight,
    ],
    ids=["transposed", "positions", "shifted", "weight read", "weight read too"],
)
def test_a_layer_whose_rows_are_not_requests_or_whose_weight_is_read_stays_dense(function):
    model = block(function)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="linear: "):
        svf = wrap(model)
    assert list(svf.left_out) == ["linear"] and svf.layout.names == ("head",)
    with torch.no_grad():
        torch.testing.assert_close(svf(IDS), plain(IDS), atol=1e-4, rtol=1e-4)


class Named(nn.Linear):
    """Computes what nn.Linear does."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Quantised(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        codes = torch.randint(
            -127, 128, self.weight.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0)
        )
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 1000, self.bias)


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora = nn.Linear(*sizes)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


class Packed4(nn.Module):
    """No nn.Linear at all, as layers of GPTQ are."""

    in_features = out_features = 32

    def forward(self, x):
        return x


class Subclass(torch.Tensor):
    """A weight that is no plain tensor, as those of torchao are."""


def of_subclass():
    layer = nn.Linear(32, 32)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))
    return layer


def test_subclasses_that_compute_the_same_are_decomposed(quiet):
    svf = wrap(block(lambda linear, x: linear(x), Named(32, 32)))
    assert svf.layout.names == ("linear", "head")


@pytest.mark.parametrize("layer", [lambda: Quantised(32, 32), of_subclass])
def test_layers_that_another_library_quantised_are_decomposed(quiet, layer):
    svf = wrap(block(lambda linear, x: linear(x), layer()))
    assert svf.layout.names == ("linear", "head") and svf.factored_layers["linear"].keeps_module


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (lambda: Doubled(32, 32), "Doubled has a forward of its own"),
        (lambda: Adapted(32, 32), r"Adapted is no plain nn\.Linear.*adapters merged"),
        (Packed4, r"Packed4 is no nn\.Linear"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), r"ParametrizedLinear.*parametrizations"),
    ],
)
def test_layers_that_are_no_plain_linear_are_named_by_class(layer, named):
    with pytest.warns(UserWarning, match=named):
        svf = wrap(block(lambda linear, x: linear(x), layer()))
    assert "linear" in svf.left_out and "linear" not in svf.layout.names
    with pytest.raises(ValueError, match=named):
        select_targets(block(lambda linear, x: linear(x), layer()), ["linear"])


def test_attention_of_torch_reads_its_weights_itself():
    model = nn.MultiheadAttention(32, 4)
    assert "MultiheadAttention" in str(unsuitable_layers(model))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        select_targets(model, "all-linear")


@pytest.mark.parametrize(("family", "share"), [("qwen3_moe", 0.25), ("mixtral", 0.14)])
def test_a_model_says_what_share_of_its_blocks_is_decomposed(family, share, monkeypatch):
    monkeypatch.setattr(
        "t2.weights.fused_experts.is_fused", lambda module, on_meta=False: False
    )  # experts of a kind that nobody knows
    with pytest.warns(UserWarning, match=rf"{share:.0%} of the blocks' weights.*experts\.gate_up_proj"):
        svf = wrap(tiny_model(family))
    assert abs(svf.coverage.share - share) < 0.02 and f"{share:.0%}" in svf.extra_repr()
    with pytest.raises(ValueError, match="experts"):
        wrap(tiny_model(family), target_modules="mlp")


def test_a_chosen_part_of_the_layers_is_no_low_coverage(quiet):
    wrap(tiny_model("llama"), target_modules="attention")
    wrap(tiny_model("llama"), target_modules=["q_proj"])


class TwoInputs(Block):
    """No inputs can be made for it."""

    def forward(self, ids, table):
        return super().forward(ids) + table["bias"]


def test_a_model_without_inputs_is_verified_with_an_example_or_by_its_first_mixed_call():
    def make(function):
        torch.manual_seed(0)
        return spread(TwoInputs(function)).eval()

    def sequence_first(linear, x):
        return linear(x.transpose(0, 1)).transpose(0, 1)

    example = {"ids": IDS, "table": {"bias": 1.0}}
    with pytest.warns(UserWarning, match="without verification.*example_inputs"):
        svf = wrap(make(sequence_first))
    with_experts(svf)
    with torch.no_grad():
        svf(ids=IDS, table=example["table"], experts="e1")
    with pytest.warns(UserWarning, match="linear: the first dimension|linear: its input"):
        assert list(wrap(make(sequence_first), example).left_out) == ["linear"]
    with pytest.raises(ValueError, match="example_inputs: expected inputs that the model takes"):
        wrap(make(sequence_first), {"ids": IDS})
    with pytest.raises(ValueError, match="example_inputs: expected tensors of at least 2 rows"):
        wrap(make(sequence_first), {"ids": IDS[:1], "table": 0})


class TwoTensors(Block):
    def forward(self, ids, bias):
        return super().forward(ids) + bias


def test_the_first_mixed_call_of_an_unverified_model_is_checked():
    torch.manual_seed(0)
    model = spread(TwoTensors(lambda linear, x: linear(x.transpose(0, 1)).transpose(0, 1))).eval()
    with pytest.warns(UserWarning, match="without verification"):
        svf = wrap(model)
    with_experts(svf)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(VerificationError, match=r"experts: expected requests in the rows.*linear"):
                svf(IDS, torch.ones(1), experts=["e0", "e1", "e2", "e3"])
        wrong = r"4 entries for 6 rows in the first dimension of the input of linear"
        with svf.route(["e0", "e1", "e2", "e3"]), pytest.raises(ValueError, match=wrong):
            svf(IDS[:, :6], torch.ones(1))


def test_verification_can_be_left_off():
    svf = wrap(tiny_model("llama"), verify=False)
    assert mixed_off_merged(svf) < 1e-4


@pytest.mark.parametrize(
    ("off", "exact", "found"), [(1, True, True), (1, False, False), (2, False, True), (0, True, False)]
)
def test_one_token_off_counts_unless_routers_may_have_chosen_otherwise(off, exact, found):
    want = torch.ones(2, 3, 8)  # six tokens
    got = want + 1e-4
    got.view(6, 8)[:off] *= 1.5
    assert (distance(got, want, 1e-3, exact=exact) is not None) == found
    assert distance(got[:1], want, 1e-3, exact=exact) == float("inf")
