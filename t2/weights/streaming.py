"""Models from checkpoints that are larger than memory: factors of one matrix at a time, never the dense model.

Target matrices go from the shards into the factor cache one by one, and from there, packed, into the model. What is
dense is the rest: embeddings, norms, biases, the output embedding. The result is `SVFModel(t2.load(...))`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from t2.weights.files import FileFormatError
from t2.weights.fused_experts import is_fused, unfuse
from t2.weights.loading import ALIASES, alias_file, convert_gguf, load, reads_images
from t2.weights.quantized import Dequantized
from t2.weights.shards import Lazy, Shards, StoredWeight, is_sharded
from t2.weights.targets import Linear, matrices_of, plain_targets, select_targets

Stream = Literal["auto", "yes", "no"]
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors")
"""Files of a repository that a Hub snapshot needs."""


def streams(name_or_path: str | Path, stream: Stream) -> bool:
    """Whether a model with this name is read matrix by matrix."""
    if stream not in ("auto", "yes", "no"):
        raise ValueError(f"stream: expected auto, yes or no, got {stream!r}")
    folder = Path(name_or_path).expanduser()
    if stream != "auto":
        return stream == "yes"
    if not is_sharded(folder):
        return False
    config = AutoConfig.from_pretrained(str(folder))
    if reads_images(config) or getattr(config, "quantization_config", None) is not None:
        return False
    return not any(is_fused(module, on_meta=True) for module in skeleton(config, torch.float32).modules())


def target_weights(
    name_or_path: str | Path, target_modules: str | Sequence[str], *, stream: Stream = "auto", dtype: torch.dtype
) -> Mapping[str, Tensor | StoredWeight | Dequantized]:
    """The target matrices [out, in] of a model by module name, as `decompose_weights` takes them; `stream` as above."""
    if streams(name_or_path, stream):
        return Checkpoint(checkpoint_folder(name_or_path), dtype).weights(target_modules)
    model, _ = load(name_or_path, dtype=dtype)
    unfuse(model, target_modules)
    return matrices_of(model, select_targets(model, target_modules))


def checkpoint_folder(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a model that `t2.load` knows, downloaded or converted where need be.

    `weights`: whether a Hub model's are wanted beside its config.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return convert_gguf(path)
    if name in ALIASES:
        file = alias_file(ALIASES[name])
        return convert_gguf(file) if file else checkpoint_folder(ALIASES[name].hub_id, weights=weights)
    if path.exists() or isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model folder {path} does not exist")
    return Path(snapshot_download(name, allow_patterns=[*FILES] if weights else ["config.json"]))


def skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a transformers config with all of its tensors on the meta device."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))


@dataclass
class Checkpoint:
    """A model folder, its tensors on disk. `dtype` is that of the model to be."""

    folder: Path
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype is {self.dtype!r}, expected a floating-point torch.dtype")
        if not (self.folder / "config.json").is_file():
            raise FileFormatError(f"folder {self.folder} has no config.json, so it is not a transformers model")
        self.config = AutoConfig.from_pretrained(str(self.folder))
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError(f"model: expected plain weights, got a quantised checkpoint in {self.folder}")
        if reads_images(self.config):
            raise ValueError(f"model: expected one that reads text alone where weights stream, got {self.folder}")
        self.shards = Shards(self.folder)
        self.skeleton = skeleton(self.config, self.dtype)

    def weights(self, target_modules: str | Sequence[str]) -> dict[str, StoredWeight]:
        """The target matrices by module name; reads none of them."""
        targets = plain_targets(self.skeleton, target_modules, on_meta=True)
        return {name: self._stored(name, layer) for name, layer in targets.items()}

    def _stored(self, module: str, layer: Linear) -> StoredWeight:
        full = f"{module}.weight"
        short = full.removeprefix(f"{self.skeleton.base_model_prefix}.")  # as checkpoints of a bare model have it
        name = next((name for name in (full, short) if name in self.shards.shapes), None)
        if name is None:
            raise ValueError(
                f"model: expected {full} in {self.folder}, found no tensor of that name; a checkpoint that "
                "transformers renames or joins while loading needs `t2.load` (stream: no)"
            )
        stored = StoredWeight(self.shards, name, layer.weight.dtype, not isinstance(layer, nn.Linear))
        if self.shards.shapes[name] != tuple(layer.weight.shape):
            raise FileFormatError(
                f"{self.folder}: expected {name} of shape {list(layer.weight.shape)} by its config, "
                f"got {list(self.shards.shapes[name])}"
            )
        return stored

    def load_rest(self, weights: dict[str, StoredWeight], device: torch.device) -> PreTrainedModel:
        """The model with everything but the targets in memory, those on the meta device.

        transformers loads it, so that ties, buffers and dtypes are its own. What it is told of a target is a tensor
        of the right shape that is one number in memory.
        """
        state: dict[str, Any] = {name: Lazy(self.shards, name) for name in self.shards.shapes}
        for weight in weights.values():
            state[weight.name] = torch.zeros((), dtype=weight.dtype).expand(self.shards.shapes[weight.name])
        loaded: Any = type(self.skeleton).from_pretrained(
            None,
            config=self.config,
            state_dict=state,
            dtype=self.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, found = loaded
        del found["unexpected_keys"]  # left alone, as `t2.load` does
        if problems := {kind: sorted(map(str, names))[:3] for kind, names in found.items() if names}:
            raise FileFormatError(f"{self.folder}: expected the tensors of its config, got {problems}")
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(self.folder))
        told = {}
        for name in weights:
            layer = model.get_submodule(name)
            told[layer] = layer.weight
            layer.weight = None  # so that nothing of its size moves to the device
        model = model.to(device).eval()
        for layer, weight in told.items():
            layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=weight.requires_grad)
        return cast(PreTrainedModel, model)
