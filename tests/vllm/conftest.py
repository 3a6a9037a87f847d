"""Tiny models on disk with experts in a bank, engines of vLLM over them, and the merged models' answers.

`make test-vllm` runs these in an environment of their own.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

import t2
from t2.integrations.vllm.bank import set_support

COMMON = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),  # biases
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=32),
    "phi3": lambda: Phi3Config(**COMMON),  # q, k and v are one matrix, gate and up another
}
PROMPTS = [[3 + (7 * i + 5 * j) % 120 for j in range(4 + i % 5)] for i in range(24)]


class Case:
    """A model's folder and bank, and the model itself as `t2` has it."""

    def __init__(self, folder, family, support=None, experts=3):
        self.folder, self.bank = folder / family, folder / f"{family}-bank"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
        model.save_pretrained(self.folder)
        config = t2.SVFConfig(progress=False, form="factored" if support is None else "delta", support=support)
        self.svf = t2.SVFModel(model, config)
        self.bank.mkdir()
        self.names = [f"e{i}" for i in range(experts)]
        for i, name in enumerate(self.names):
            self.add(name, i)

    def expert(self, seed, std=0.4):
        table = self.svf.slot_table
        noise = torch.randn(len(table.column_sigma), generator=torch.Generator().manual_seed(seed))
        return t2.Expert(table.with_columns(1 + std * noise), self.svf.layout)

    def add(self, name, seed):
        self.expert(seed).save(self.bank / f"{name}.safetensors")
        self.svf.add_expert(name, self.expert(seed), replace=name in self.svf.bank)

    def merged(self, choice, prompt, new_tokens=12):
        """Greedy tokens of the model with an expert or a mix {name: weight} built in."""
        if isinstance(choice, dict):
            choice = self.svf.bank.mix(choice)
        model = self.svf.merged_copy(choice)
        model.generation_config.eos_token_id = None
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return out[0, len(prompt) :].tolist()


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE", str(tmp_path / "cache"))

    def make(family="llama", **options):
        made = Case(tmp_path, family, **options)
        monkeypatch.setenv("T2_BANK", str(made.bank))
        monkeypatch.delenv("T2_SUPPORT", raising=False)
        set_support()  # as in a process of its own
        return made

    yield make
    os.environ.pop("T2_SUPPORT", None)


@contextmanager
def engine(case, method, **options):
    """vLLM over a case, float32."""
    from vllm import LLM

    given = {"max_loras": 8, "max_cpu_loras": 8, "max_num_seqs": 16, "max_model_len": 64, "dtype": "float32"}
    given |= {"enable_lora": True, "max_lora_rank": 1, "quantization": method, "skip_tokenizer_init": True}
    given |= {"enforce_eager": True}
    llm = LLM(str(case.folder), **given | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answers(llm, asked, new_tokens=12):
    """Greedy tokens of (expert's name or None, prompt) pairs."""
    from vllm import SamplingParams

    from t2.integrations.vllm.bank import lora_request

    options = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for _, prompt in asked]
    experts = [None if name is None else lora_request(name) for name, _ in asked]
    found = llm.generate(prompts, options, use_tqdm=False, lora_request=experts)
    return [list(each.outputs[0].token_ids) for each in found]
