"""Generation with the decode kernel and the growing cache against transformers' own attention and cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, MistralConfig, StoppingCriteria

import t2
from t2.model import attention
from t2.model.kv_cache import GrowingLayer, growing_cache

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "sliding window": lambda: MistralConfig(**_SIZES, sliding_window=16),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=2),
}


def make_model(family="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.1)
    return model


def wrap(model, **options):
    return t2.SVFModel(model, t2.SVFConfig(cache=False, progress=False, verify=False, **options))


def padded_prompts():
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :6] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def calls(monkeypatch):
    """Counts the attentions that ran on the kernel."""
    counted = []
    kernel = attention.ops.decode_attention
    monkeypatch.setattr(attention.ops, "decode_attention", lambda *args: counted.append(1) or kernel(*args))
    return counted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 2, "rows": 1},
    ],
    ids=str,
)
def test_generates_what_the_plain_model_generates(family, options, calls):
    options = dict(options)
    rows = options.pop("rows", 3)
    batch = {name: tensor[:rows] for name, tensor in padded_prompts().items()}
    model = make_model(family)
    length = {"max_new_tokens": 90, "min_new_tokens": 90}  # past the window, and past the room of the first buffer
    torch.manual_seed(3)
    expected = model.generate(**batch, **length, **options)
    torch.manual_seed(3)
    answer = wrap(model).generate(**batch, experts=[None] * rows, **length, **options)
    assert torch.equal(answer, expected)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_and_decode_steps_run_on_the_kernel(dtype, calls):
    svf = wrap(make_model().to(dtype))
    svf.generate(**padded_prompts(), experts=None, max_new_tokens=5, min_new_tokens=5)
    assert len(calls) == 2 * 5


def test_a_rows_tokens_do_not_depend_on_its_padding():
    svf = wrap(make_model())
    batch, length = padded_prompts(), {"max_new_tokens": 8, "min_new_tokens": 8}
    together = svf.generate(**batch, experts=[None] * 3, **length)
    alone = svf.generate(input_ids=batch["input_ids"][1:2, 3:], experts=[None], **length)
    assert torch.equal(together[1, 7:], alone[0, 4:])


def test_attention_is_put_back(calls):
    model = make_model()
    svf = wrap(model)
    assert model.config._attn_implementation == "sdpa"  # families read what it says
    svf.merged_copy(None).generate(**padded_prompts(), max_new_tokens=3, min_new_tokens=3)
    make_model().generate(**padded_prompts(), max_new_tokens=3, min_new_tokens=3)  # another model of the process
    assert not calls
    svf.generate(**padded_prompts(), experts=None, max_new_tokens=3, min_new_tokens=3)
    assert calls
    calls.clear()
    svf.unload().generate(**padded_prompts(), max_new_tokens=3, min_new_tokens=3)
    assert not calls


def test_a_chosen_attention_stays():
    model = make_model()
    model.set_attn_implementation("eager")
    svf = wrap(model)
    assert model.config._attn_implementation == "eager"
    assert svf.unload().config._attn_implementation == "eager"


def test_gradients_run_through_transformers_attention(calls):
    svf = wrap(make_model())
    z = torch.ones(svf.layout.R, requires_grad=True)
    cache = DynamicCache(config=svf.model.config)
    ids = padded_prompts()["input_ids"][:1]
    with svf.route([z]):
        svf.model(input_ids=ids[:, :-1], past_key_values=cache)
        svf.model(input_ids=ids[:, -1:], past_key_values=cache).logits.sum().backward()
    assert z.grad.abs().sum() > 0 and not calls


def test_tokens_are_ordinary_tensors_and_returned_caches_go_on():
    svf = wrap(make_model())
    batch = padded_prompts()
    tokens = svf.generate(**batch, experts=None, max_new_tokens=3)
    assert not tokens.is_inference()
    tokens[0, 0] = 5
    result = svf.generate(**batch, experts=None, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert not result.sequences.is_inference() and not result.logits[0].is_inference()
    assert type(result.past_key_values.layers[0]) is not GrowingLayer
    mine = growing_cache(svf.model)
    svf.generate(**batch, experts=None, max_new_tokens=3, min_new_tokens=3, past_key_values=mine)
    assert mine.get_seq_length() == 7 + 2 and not mine.layers[0].keys.is_inference()


def test_callbacks_of_generate_see_every_step():
    class Count(StoppingCriteria):
        steps = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.steps += 1
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    count = Count()
    svf = wrap(make_model())
    svf.generate(**padded_prompts(), experts=None, max_new_tokens=4, min_new_tokens=4, stopping_criteria=[count])
    assert count.steps == 4
