"""Models divided over processes, compared with the same in one process: a program for torchrun, used by the tests.

python -m torch.distributed.run --nproc-per-node 2 -m tests.t2.processes.divided [FAMILY ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import t2
from tests.families.tiny import tiny_model

BATCH, LENGTH = 3, 9


def wrapped(family: str, cache: str, **options: Any) -> t2.SVFModel:
    config = t2.SVFConfig(cache_dir=cache, progress=False, dtype=options.pop("dtype", torch.float32), **options)
    model, generator = tiny_model(family), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zeros in a new model
            parameter.data.normal_(std=0.1, generator=generator)
    svf = t2.SVFModel(model, config)
    support = svf.support
    for seed in range(2):
        z = t2.Expert.random(svf.layout, 0.3, seed).z
        if support is not None:
            z = torch.ones_like(z).index_copy(0, support, z[support])
        svf.add_expert(f"e{seed}", t2.Expert(z, svf.layout))
    return svf


def answers(svf: t2.SVFModel) -> dict[str, torch.Tensor]:
    """Logits of a mixed batch, the gradient of z and of the embeddings, and tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=generator)
    experts = ["e0", None, "e1"]
    with torch.no_grad():
        logits = svf(input_ids=ids, experts=experts).logits
    z = svf.bank["e0"].z.clone().requires_grad_()
    embedded = svf.model.get_input_embeddings()(ids).detach().requires_grad_()
    with svf.route(z):
        svf.model(inputs_embeds=embedded).logits.square().mean().backward()
    assert z.grad is not None and embedded.grad is not None
    gradient = z.grad if svf.support is None else z.grad[svf.support]
    tokens = svf.generate(input_ids=ids, experts=experts, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return {"logits": logits, "z": gradient, "inputs": embedded.grad, "tokens": tokens}


def compared(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest difference of each tensor, as a share of the largest value."""
    return {
        name: float((found[name].double() - expected[name].double()).abs().max() / expected[name].double().abs().max())
        for name in expected
    }


def check(family: str, mesh: DeviceMesh, cache: str) -> dict[str, Any]:
    """Differences of both ways of dividing, in both forms; int8, whose scales are a part's own, sharded alone."""
    forms: dict[str, dict[str, Any]] = {"factored": {}, "delta": {"form": "delta", "support": 8}}
    forms["int8"] = {"dtype": torch.int8}
    found: dict[str, Any] = {}
    for form, options in forms.items():
        alone = wrapped(family, cache, **options)
        expected = answers(alone)
        merged = alone.merged_copy("e1").state_dict()
        whole = alone.decomposed.routed
        for way in ("shard",) if form == "int8" else ("tensor_parallel", "shard"):
            svf = wrapped(family, cache, **options, **{way: mesh})
            found[f"{form} {way}"] = compared(answers(svf), expected)
            if way == "tensor_parallel":
                copy = svf.merged_copy("e1").state_dict()
                found[f"{form} {way}"]["merged"] = float(any(not torch.equal(copy[n], merged[n]) for n in merged))
                parts = [
                    sum(layer.weight.nbytes for layer in layers.values()) for layers in (svf.decomposed.routed, whole)
                ]
                found[f"{form} share"] = parts[0] / parts[1]
                found["styles"] = {name: layer.division.style for name, layer in svf.decomposed.routed.items()}
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        for family in sys.argv[1:]:
            found = check(family, mesh, cache)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found)
            if dist.get_rank() == 0:
                print(json.dumps({"family": family, "found": everyone}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
