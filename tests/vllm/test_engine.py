"""Answers of vLLM with experts are those of merged models, in both forms."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from vllm.config import CompilationMode

import t2
from t2.integrations.export import export_vllm
from t2.integrations.vllm.plan import ModelPlan

from .conftest import PROMPTS, answers, engine

FORMS = {"factored": ("t2_svf", None), "delta": ("t2_svf_delta", 24), "delta beside vLLM's kernels": (None, 24)}
MIX = {"e0": 0.7, "e2": 0.3}


def asked_of(case):
    names = [None, *case.names, "e0:0.7+e2:0.3"]
    return [(names[i % len(names)], prompt) for i, prompt in enumerate(PROMPTS)]


def expected(case, asked):
    return [case.merged(MIX if name and ":" in name else name, prompt) for name, prompt in asked]


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_batch_is_the_merged_models(case, form):
    method, support = FORMS[form]
    made = case(support=support)
    asked = asked_of(made)
    with engine(made, method) as llm:
        found = answers(llm, asked)
        again = answers(llm, asked[::-1])[::-1]
    wanted = expected(made, asked)
    assert found == wanted
    assert again == found
    assert len({tuple(each) for each in wanted}) > len(wanted) // 2  # experts say different things


@pytest.mark.parametrize("method", ["t2_svf", "t2_svf_delta"])
def test_compiled_passes_give_the_same_answers(case, method):
    made = case(support=24)
    asked = asked_of(made)
    with engine(made, method, enforce_eager=False) as llm:
        config = llm.llm_engine.vllm_config.compilation_config
        assert config.mode == CompilationMode.DYNAMO_TRACE_ONCE
        assert answers(llm, asked) == expected(made, asked)
        made.add("e1", 99)
        assert answers(llm, asked) == expected(made, asked)  # tables are read where they are


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("form", ["factored", "delta beside vLLM's kernels"])
def test_other_families(case, family, form):
    method, support = FORMS[form]
    made = case(family, support=support)
    asked = asked_of(made)
    with engine(made, method) as llm:
        assert answers(llm, asked) == expected(made, asked)


@pytest.mark.parametrize("storage", ["t2_svf_int8", "t2_svf_delta_int8", "t2_svf_delta_int4", "t2_svf_delta_uint8"])
def test_short_storage_answers(case, storage):
    made = case(support=24)
    with engine(made, storage, dtype="bfloat16") as llm:
        found = answers(llm, asked_of(made))
    assert all(len(each) == 12 for each in found)
    assert len({tuple(each) for each in found}) > len(found) // 2


def test_more_experts_than_slots_and_a_replaced_one_with_the_prefix_cache_on(case):
    made = case(support=24, experts=40)
    asked = [(made.names[i % 40], PROMPTS[i % 24]) for i in range(80)]
    with engine(made, "t2_svf_delta", enable_prefix_caching=True) as llm:
        assert answers(llm, asked) == expected(made, asked)
        made.add("e3", 1234)  # the same name, another content
        changed = [("e3", prompt) for prompt in PROMPTS]
        assert answers(llm, changed) == expected(made, changed)
        assert answers(llm, asked[:8]) == expected(made, asked[:8])


def test_an_expert_beside_the_support_is_refused(case):
    made = case(support=24)
    with engine(made, "t2_svf_delta") as llm:
        late = t2.Expert(1 + 0.1 * torch.ones(made.svf.layout.R), made.svf.layout)
        late.save(made.bank / "late.safetensors")
        with pytest.raises(Exception, match="components beside it"):
            answers(llm, [("late", PROMPTS[0])])
        tables = ModelPlan.of(llm.llm_engine.vllm_config).tables
        broken = [int(row) for row in tables[0].isnan().all(1).nonzero()]
        assert len(broken) == 1  # of all layers: half an expert never answers
        assert all(bool(table[broken[0]].isnan().all()) for table in tables)


def test_experts_of_other_weights_are_refused(case):
    made = case(support=24)
    model = made.svf.unload()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(made.folder)
    with pytest.raises(Exception, match="expected experts of the weights in"), engine(made, "t2_svf_delta"):
        pass


def test_an_expert_of_other_weights_is_refused_wherever_it_comes_from(case):
    made = case(support=24)
    layout = made.svf.layout
    with engine(made, "t2_svf_delta") as llm:
        t2.Expert(made.expert(3).z, replace(layout, fingerprint="0" * 64)).save(made.bank / "foreign.safetensors")
        with pytest.raises(Exception, match="expected an expert of the weights in"):
            answers(llm, [("foreign", PROMPTS[0])])


@pytest.mark.parametrize("method", ["t2_svf_delta", None])
def test_layers_that_hold_other_weights_than_the_checkpoint_are_refused(case, monkeypatch, tmp_path, method):
    made = case(support=24)
    monkeypatch.setenv("T2_CHECKPOINT", str(shutil.copytree(made.folder, tmp_path / "checkpoint")))
    with engine(made, method) as llm:
        assert answers(llm, [("e0", PROMPTS[0])]) == expected(made, [("e0", PROMPTS[0])])
    model = made.svf.unload()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3].neg_()  # one row of one matrix
    model.save_pretrained(made.folder)
    with (
        pytest.raises(Exception, match=r"layers\.1\.self_attn\.qkv_proj: expected the weights of"),
        engine(made, method),
    ):
        pass


def test_the_methods_need_adapters(case):
    with pytest.raises(Exception, match="enable_lora"), engine(case(), "t2_svf", enable_lora=False):
        pass


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("form", FORMS)
def test_two_processes_share_the_matrices(case, monkeypatch, family, form):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    method, support = FORMS[form]
    made = case(family, support=support)
    asked = asked_of(made)
    with engine(made, method, tensor_parallel_size=2) as llm:
        assert answers(llm, asked) == expected(made, asked)


def test_an_exported_adapter_and_a_foreign_one(case, tmp_path):
    from safetensors.torch import save_file
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    made = case(support=24)
    export_vllm(made.svf, made.expert(7), tmp_path / "mine")
    made.svf.add_expert("mine", made.expert(7))
    names = made.svf.layout.names
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        (tmp_path / "mine" / "adapter_config.json").read_text()  # of rank 1, like a LoRA adapter's
    )
    weights = {name: made.svf.model.get_submodule(name) for name in names}
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(1, m.in_features) for name, m in weights.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.zeros(m.out_features, 1) for name, m in weights.items()}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    options = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": PROMPTS[0]}
    with engine(made, "t2_svf_delta") as llm:
        mine = LoRARequest("mine", 1, str(tmp_path / "mine"))
        (found,) = llm.generate([prompt], options, use_tqdm=False, lora_request=mine)
        assert list(found.outputs[0].token_ids) == made.merged("mine", PROMPTS[0])
        with pytest.raises(Exception, match="got a LoRA adapter"):
            llm.generate([prompt], options, use_tqdm=False, lora_request=LoRARequest("l", 2, str(tmp_path / "lora")))
