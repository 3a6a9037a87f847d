"""Checkpoints in the formats that quantised models are published in, of SmolLM2, rounded to nearest.

Each function writes a folder with the tensors and the quantization_config that the format's library and transformers
read. Published ones choose codes better (that is what GPTQ and AWQ are names of); the layers that read them are these.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

GROUP, LEVELS, FP8_BLOCK, FP8_MOST = 32, 15, 64, 448.0
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns of eight codes in an int32 of AWQ, lowest bits first."""


def _written(
    source: Path,
    folder: Path,
    config: dict[str, Any],
    packed: Callable[[Tensor], dict[str, Tensor]],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """A copy of a model's folder with the weights of its blocks' linear layers packed, and others in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("_proj.weight"):
            parts = packed(tensor.float())
            tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return folder


def _codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in] of four bits, and zero points and scales [out, in / GROUP]."""
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.amin(-1), groups.amax(-1)
    scales = ((most - least) / LEVELS).clamp(min=1e-6)
    zeros = (-least / scales).round().clamp(1, LEVELS)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, LEVELS)
    return codes.flatten(1).long(), zeros.long(), scales


def _packed(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes along a dimension in one int32."""
    parts = codes.unflatten(dim, (-1, 8)).movedim(dim + 1, 0)
    words = sum(parts[place] << (4 * bits) for bits, place in enumerate(order))
    assert isinstance(words, Tensor)
    return words.to(torch.uint32).view(torch.int32)


def gptq(source: Path, folder: Path) -> Path:
    """GPTQ of four bits, groups of 32, codes packed along the inputs."""

    def parts(weight: Tensor) -> dict[str, Tensor]:
        codes, zeros, scales = _codes(weight)
        return {
            "qweight": _packed(codes.T, 0),
            "qzeros": _packed(zeros.T - 1, 1),  # as version 1 of the format has them
            "scales": scales.T.half(),
            "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
        }

    about = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    return _written(source, folder, about | {"checkpoint_format": "gptq"}, parts)


def awq(source: Path, folder: Path) -> Path:
    """AWQ of four bits, groups of 32, codes packed along the outputs."""

    def parts(weight: Tensor) -> dict[str, Tensor]:
        codes, zeros, scales = _codes(weight)
        return {
            "qweight": _packed(codes.T, 1, AWQ_ORDER),
            "qzeros": _packed(zeros.T, 1, AWQ_ORDER),
            "scales": scales.T.half(),
        }

    about = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _written(source, folder, about, parts)


def fp8(source: Path, folder: Path) -> Path:
    """float8 with a scale a block, as DeepSeek and Qwen publish; theirs are 128 x 128, which does not divide 576."""

    def parts(weight: Tensor) -> dict[str, Tensor]:
        out, inputs = weight.shape
        blocks = weight.reshape(out // FP8_BLOCK, FP8_BLOCK, inputs // FP8_BLOCK, FP8_BLOCK)
        scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / FP8_MOST
        codes = (blocks / scales[:, None, :, None]).reshape(out, inputs)
        return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scales}

    about = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return _written(source, folder, about | {"weight_block_size": [FP8_BLOCK, FP8_BLOCK]}, parts, torch.bfloat16)


def compressed_tensors(source: Path, folder: Path, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Path:
    """A format of compressed-tensors, which vLLM's own checkpoints have, by its library."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    form = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=form, input_activations=None if inputs is None else QuantizationArgs(**inputs)
    )
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "weight_scale")]
    for layer in layers:
        values = layer.weight.data
        values = values.unflatten(1, (-1, form.group_size)) if form.group_size else values[:, None]
        scales, _ = calculate_qparams(values.amin(-1), values.amax(-1), form)
        layer.weight_scale.data = scales.to(layer.weight_scale.dtype)
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressor.compress_model(model)
        model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder
