"""A wrapped model in the hands of others: casts, copies, trainers, embeddings that change, routes, the bank."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

import t2
from t2.experts.expert import ExpertBank
from tests.families.tiny import tiny_model

IDS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))


def wrap(model=None, **options):
    return t2.SVFModel(model or tiny_model("llama"), t2.SVFConfig(**{"cache": False, "progress": False} | options))


def expert(svf, seed=1, std=0.3):
    return t2.Expert.random(svf.layout, std=std, seed=seed)


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def close(got, want, bound=1e-3):
    assert float((got.float() - want.float()).abs().max() / want.float().abs().max()) <= bound


# Casts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("whole", [True, False], ids=["svf.to", "svf.model.to"])
def test_models_that_come_back_from_a_cast_one_have_its_dtype(dtype, cache, whole, own_cache):
    svf = wrap(cache=cache)
    svf.add_expert("e", expert(svf, std=0.05))
    plain = svf.merged_copy("e")
    (svf if whole else svf.model).to(dtype)
    for model, want in ((svf.merged_copy("e"), plain), (svf.unload(), tiny_model("llama"))):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        close(logits(model), logits(want), 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_z_in_training_stays_float32_whatever_the_model_is_cast_to(dtype):
    svf = wrap()
    z = svf.start_training()
    z.data += 1e-4 * torch.randn(z.shape)
    before = z.detach().clone()
    svf.to(dtype)
    assert svf.z is z and z.dtype == torch.float32 and torch.equal(z, before)


# Copies


@pytest.mark.parametrize("part", [lambda svf: svf, lambda svf: svf.model], ids=["svf", "svf.model"])
def test_copies_say_what_to_do_instead(part):
    svf = wrap()
    for work in (copy.deepcopy, copy.copy, pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        if work is copy.copy and part(svf) is svf.model:
            continue  # shares its modules, as copy.copy does
        with pytest.raises(TypeError, match=r"copied nor pickled.*merge"):
            work(part(svf))


# Training


@pytest.mark.parametrize("family", ["gemma4_text", "opt", "xlm-roberta"])
def test_every_layer_trains_in_every_step_whatever_the_order_of_calls(family):
    svf = wrap(tiny_model(family))
    z = svf.start_training()
    optimizer = torch.optim.SGD([z], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        svf(input_ids=IDS, labels=IDS).loss.backward()
        given = z.detach().clone().requires_grad_()
        svf(input_ids=IDS, labels=IDS, experts=given).loss.backward()
        close(z.grad, given.grad, 1e-5)
        optimizer.step()
    logits(svf)
    z.data.mul_(1.5)  # no version of z says so
    assert torch.equal(logits(svf), logits(svf, experts=z.detach().clone()))


def test_two_passes_before_two_backward_passes_and_a_graph_that_is_kept():
    svf = wrap()
    z = svf.start_training()
    first = svf(input_ids=IDS[:1], labels=IDS[:1]).loss
    second = svf(input_ids=IDS[1:], labels=IDS[1:]).loss
    first.backward(retain_graph=True)
    once = z.grad.clone()
    first.backward()
    close(z.grad, 2 * once, 1e-6)
    second.backward()
    z.requires_grad_(False)
    assert not svf(input_ids=IDS, labels=IDS).loss.requires_grad


class Rows(torch.utils.data.Dataset):
    def __init__(self, **more):
        self.more = more

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"input_ids": IDS[i % 2], "labels": IDS[i % 2]} | self.more


class Bare(nn.Module):
    """Takes no other arguments than its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(96, 32), nn.Linear(32, 32), nn.Linear(32, 96)

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.relu(self.linear(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def trainer(model, folder, rows=None, **options):
    defaults = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    rows = rows or Rows()
    made = Trainer(model=model, args=TrainingArguments(**defaults | options), train_dataset=rows, eval_dataset=rows)
    made.remove_callback(PrinterCallback)
    return made


def in_training(model=None):
    svf = wrap(model)
    svf.start_training()
    return svf


def test_trainer_reads_the_models_arguments(tmp_path):
    want = trainer(tiny_model("llama"), tmp_path / "plain").evaluate()["eval_loss"]
    assert abs(trainer(in_training(), tmp_path / "svf").evaluate()["eval_loss"] - want) < 1e-3
    trainer(in_training(), tmp_path / "columns", Rows(difficulty=torch.tensor(1.0))).train()
    trainer(in_training(Bare()), tmp_path / "bare").train()
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = trainer(in_training(), tmp_path / "best", load_best_model_at_end=True, **every)
    best.train()
    assert best.state.best_metric is not None
    casting = trainer(in_training(), tmp_path / "cast", bf16_full_eval=True)
    casting.train()
    before = casting.model.z.detach().clone()
    casting.evaluate()
    assert torch.equal(casting.model.z, before)


# Embeddings


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_an_output_embedding_follows_its_weight(tie):
    model = tiny_tied(tie)
    plain, svf = copy.deepcopy(model), wrap(model)
    with torch.no_grad():
        for each in (model, plain):
            each.get_input_embeddings().weight[IDS[0, 0]] += 1.0
            each.lm_head.weight[5] *= 2
    close(logits(svf), logits(plain))
    close(logits(svf.model), logits(plain))
    svf.tie_weights()
    svf.resize_token_embeddings(100)
    plain.resize_token_embeddings(100)
    assert logits(svf).shape[-1] == 100
    close(logits(svf)[..., :96], logits(plain)[..., :96])
    close(logits(svf.merged_copy(None))[..., :96], logits(plain)[..., :96])
    given = svf.unload()
    assert given is model and type(given.lm_head) is nn.Linear
    assert not any("packed" in name for name in given.state_dict())


def tiny_tied(tie):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=tie, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("pack_others", [True, False])
def test_a_trained_output_embedding_gets_its_gradient(pack_others):
    def gradient(model, weight):
        weight.requires_grad_(True)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return weight.grad

    model, plain = tiny_tied(False), tiny_tied(False)
    weight = model.lm_head.weight
    svf = wrap(model, pack_others=pack_others)
    svf.start_training()
    close(gradient(svf, weight), gradient(plain, plain.lm_head.weight))


def test_saved_weights_are_the_plain_models_and_load_again():
    model = tiny_tied(False)
    svf = wrap(model)
    assert svf.model.state_dict().keys() & {"lm_head.weight"} and "lm_head.packed.weight" not in svf.state_dict()
    state = {name: 2 * tensor for name, tensor in model.state_dict().items() if name == "lm_head.weight"}
    before = logits(svf)
    svf.model.load_state_dict(state, strict=False)
    close(logits(svf), 2 * before)


def test_hooks_of_a_layer_still_run():
    model, seen = tiny_model("llama"), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, y: seen.append("before"))
    svf = wrap(model, verify=False)
    svf.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append("after"))
    logits(svf)
    assert seen == ["before", "after"]
    logits(svf.unload())
    assert seen == ["before", "after"] * 2


# Routes


def test_a_route_that_no_layer_reads_is_an_error():
    svf = wrap()
    svf.add_expert("a", expert(svf))

    def elsewhere(**options):
        thread = threading.Thread(target=lambda: logits(svf.model))
        thread.start()
        thread.join()

    for choice in ("a", ["a", None], {"a": 0.5}, torch.ones(svf.layout.R), expert(svf)):
        with pytest.raises(RuntimeError, match="another thread, or not at all"), svf.route(choice):
            elsewhere()
    with svf.route(None):
        elsewhere()
    with pytest.raises(KeyError, match="own"), svf.route("a"):
        raise KeyError("own")
    with svf.route("a"):
        logits(svf.model)
    with svf.route("a"):
        logits(svf)  # enters the route in force again
    with pytest.raises(RuntimeError, match="not at all"), svf.route("a"):
        logits(svf, experts=None if False else [None, None])
    with pytest.raises(RuntimeError, match="not at all"), svf.route("a"):
        pass


# The bank


def test_the_bank_is_what_is_served():
    svf = wrap()
    first, second = expert(svf, 1), expert(svf, 2)
    svf.bank.add("e", first)
    assert torch.equal(logits(svf, experts="e"), logits(svf, experts=first))
    svf.bank.add("e", second, replace=True)
    assert torch.equal(logits(svf, experts="e"), logits(svf, experts=second))
    close(logits(svf, experts="e"), logits(svf.merged_copy("e")))
    svf.bank.remove("e")
    with pytest.raises(ValueError, match="expert: expected one of"):
        logits(svf, experts="e")
    svf.add_expert("e", first)
    assert torch.equal(logits(svf, experts="e"), logits(svf, experts=first))
    want = logits(svf, experts="e")
    first.z.mul_(2)  # the caller's own
    svf.bank["e"].z.mul_(2)
    assert torch.equal(logits(svf, experts="e"), want)
    close(logits(svf.merged_copy("e")), want)
    with pytest.raises(AttributeError):
        svf.bank = ExpertBank(svf.layout)
    in_use = svf.slot_table.in_use
    with pytest.raises(ValueError, match="name: expected one not yet"):
        svf.bank.add("e", second)
    assert svf.slot_table.in_use == in_use


def test_training_leaves_the_models_own_parameters_as_they_were(tiny_model):
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    svf = t2.SVFModel(model, t2.SVFConfig(cache=False, progress=False))
    svf.start_training()
    assert [name for name, p in svf.named_parameters() if p.requires_grad] == ["z"]
    svf.finish_training()
    assert {name: p.requires_grad for name, p in svf.unload().named_parameters()} == before
