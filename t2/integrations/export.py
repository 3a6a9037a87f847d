"""Experts as files of other formats: a merged model, adapters of PEFT's SVF method, of LoRA, and of vLLM's plug-in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from t2.experts.expert import Expert
from t2.experts.layout import Layout
from t2.experts.support import support_of
from t2.integrations.vllm.bank import write_adapter
from t2.model.svf_model import SVFModel
from t2.weights.files import atomic_directory
from t2.weights.fused_experts import parents_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""In front of the names of modules in files of PEFT."""


@dataclass(frozen=True)
class LoRALoss:
    """Share of an expert that a LoRA adapter keeps.

    rank: of the adapter. kept: share of the change of all weights, as squared Frobenius norms. worst: the module that
    keeps least, and its share.
    """

    rank: int
    kept: float
    worst: tuple[str, float]


def export_merged(svf: SVFModel, tokenizer: Any, expert: Expert, folder: Path | str) -> None:
    """Writes the model with an expert built in, and its tokenizer, as `save_pretrained` does.

    Raises:
        ValueError: an expert of another base. FileExistsError: the folder is there already.
    """
    _check(svf, expert, folder, by_module=False)
    merged: Any = svf.merged_copy(expert)
    with atomic_directory(folder) as temporary:
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def export_peft(svf: SVFModel, expert: Expert, folder: Path | str) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` reads after `import t2.integrations.peft`.

    An expert that differs from z = 1 at half of the components or fewer becomes one on that support.
    Raises as `export_merged` does.
    """
    layout = _check(svf, expert, folder)
    positions = support_of([expert])
    small = 0 < len(positions) <= layout.R // 2
    support: dict[str, list[int]] | None = {} if small else None
    tensors = {}
    for name in layout.names:
        offset = expert[name] - 1
        if support is not None:
            kept = offset.nonzero()[:, 0] if bool(offset.any()) else torch.zeros(1, dtype=torch.int64)
            support[name], offset = kept.tolist(), offset[kept]
        tensors[f"{PREFIX}{name}.svf_offset"] = offset
    config = {"peft_type": "SVF", "support": support, "target_modules": list(layout.names)}
    _write(folder, tensors, config, svf)


def export_lora(svf: SVFModel, expert: Expert, folder: Path | str, rank: int) -> LoRALoss:
    """Writes a LoRA adapter of the components that change the weights most, at most `rank` of each matrix.

    W' - W = U diag(s (z - 1)) Vh, so the `rank` largest |s (z - 1)| are the best approximation of that rank.

    Raises:
        ValueError: a rank below 1, or as `export_merged`. FileExistsError: the folder is there already.
    """
    if rank < 1:
        raise ValueError(f"rank: expected an integer >= 1, got {rank}")
    layout = _check(svf, expert, folder)
    changes = {name: (svf.sigma[layout.window(name)].cpu() * (expert[name] - 1)).float() for name in layout.names}
    rank = min(rank, max(1, *(int(change.count_nonzero()) for change in changes.values())))
    tensors, shares, kept, whole = {}, dict[str, float](), 0.0, 0.0
    for name, change in changes.items():
        _, (u, _, vh) = svf.decomposed.dense(name)
        if svf.support is not None:
            own = svf.support[(svf.support >= layout.window(name).start) & (svf.support < layout.window(name).stop)]
            change = change[own.cpu() - layout.window(name).start]
        largest = change.abs().topk(min(rank, len(change))).indices.sort().values
        root = change[largest].abs().sqrt()
        a, b = root[:, None] * vh.cpu()[largest], u.cpu()[:, largest] * (root * change[largest].sign())
        missing = rank - len(largest)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing))
        own_kept, own_whole = float(change[largest].square().sum()), float(changes[name].square().sum())
        shares[name] = own_kept / own_whole if own_whole else 1.0
        kept, whole = kept + own_kept, whole + own_whole
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": _suffixes(svf, layout)}
    _write(folder, tensors, config | {"lora_dropout": 0.0, "bias": "none"}, svf)
    return LoRALoss(rank, kept / whole if whole else 1.0, min(shares.items(), key=lambda item: item[1]))


def export_vllm(svf: SVFModel, expert: Expert, folder: Path | str) -> None:
    """Writes an adapter for vLLM with this package's plug-in: `vllm serve --lora-modules NAME=FOLDER` (docs/vllm.md).

    Raises as `export_merged` does.
    """
    _check(svf, expert, folder)
    write_adapter(expert, folder)


def _check(svf: SVFModel, expert: Expert, folder: Path | str, *, by_module: bool = True) -> Layout:
    """by_module: whether the format has a tensor for each module, and so none for the experts within one."""
    svf.layout.check_same(expert.layout, "expert")
    if by_module and (experts := parents_of(svf.model).keys() & set(svf.layout.names)):
        raise ValueError(
            f"expert: expected one of linear layers alone, got one of routed experts too, such as {min(experts)}, for "
            "which adapters have no place; the merged format holds them"
        )
    if Path(folder).exists():
        raise FileExistsError(f"output: expected a folder that is not there yet, got {folder}")
    return svf.layout


def _suffixes(svf: SVFModel, layout: Layout) -> list[str]:
    """Last parts of the modules' names where these mean no other modules, as most adapters have them; else names."""
    last = sorted({name.rpartition(".")[2] for name in layout.names})
    meant = {name for name, _ in svf.model.named_modules() if name.rpartition(".")[2] in last}
    return last if meant == set(layout.names) else list(layout.names)


def _write(folder: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], svf: SVFModel) -> None:
    about = {"base_model_name_or_path": svf.layout.base_model, "task_type": "CAUSAL_LM", "inference_mode": True}
    with atomic_directory(folder) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS, {"format": "pt"}
        )
        (temporary / CONFIG).write_text(json.dumps(about | dict(config), indent=2) + "\n")
