"""`generate` with a static cache, which transformers compiles on a GPU, and decoder layers compiled one by one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.harness import Results
from t2 import Expert, SVFConfig, SVFModel

EXPERTS = [["a", None, "b"], ["b", "a", None]]


def small_model(device: torch.device, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(device, dtype).eval()


def wrapped(device: torch.device, dtype: torch.dtype) -> SVFModel:
    svf = SVFModel(small_model(device, dtype), SVFConfig(cache=False, progress=False))
    for seed, name in enumerate("ab"):
        svf.add_expert(name, Expert.random(svf.layout, seed=seed))
    return svf


def static_cache(device: torch.device) -> dict[str, Any]:
    """Greedy tokens of a dynamic and of a static cache, for two assignments of experts."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    svf = wrapped(device, torch.float32)
    ids = torch.randint(3, 512, (3, 9), generator=torch.Generator().manual_seed(1)).to(device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    same, graphs = [], []
    for experts in EXPERTS:
        expected = svf.generate(ids, experts=experts, **options)
        found = svf.generate(ids, experts=experts, cache_implementation="static", **options)
        same.append(bool(torch.equal(expected, found)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    return {"same_tokens": same, "graphs_after": graphs, "graph_breaks": {k[:200]: n for k, n in breaks.items()}}


def regional(device: torch.device) -> dict[str, Any]:
    """Every decoder layer compiled: how many graphs twelve of them take, and what other experts add."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    svf = wrapped(device, torch.float32)
    ids = torch.randint(3, 512, (3, 9), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad():
        expected = [svf(ids, experts=experts, use_cache=False).logits for experts in EXPERTS]
        for layer in svf.model.get_submodule("model.layers").children():
            layer.compile()
        found = [svf(ids, experts=EXPERTS[0], use_cache=False).logits]
        graphs = [torch._dynamo.utils.counters["stats"]["unique_graphs"]]
        found.append(svf(ids, experts=EXPERTS[1], use_cache=False).logits)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    return {
        "relative_differences": differences,
        "graphs_after": graphs,
        "graph_breaks": {k[:200]: n for k, n in breaks.items()},
    }


def measure(results: Results, device: torch.device, smoke: bool) -> None:
    if smoke:
        results.put("generate", {"skipped": "compiles for minutes without a GPU"})
        return
    results.once("generate | static cache", lambda: static_cache(device))
    results.once("generate | decoder layers compiled", lambda: regional(device))
