"""Models from checkpoints that are larger than memory: factors of one matrix at a time, never the dense model.

Target matrices go from the shards into the factor cache one by one, and from there, packed, into the model. What is
dense is the rest: embeddings, norms, biases, the output embedding. The result is `SVFModel(t2.load(...))`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from t2.weights.fused_experts import UnfusedExperts, parents_of, unfuse
from t2.weights.loading import ALIASES, alias_file, convert_gguf, load, reads_images
from t2.weights.quantized import Dequantized, finish_loading
from t2.weights.shards import Lazy, Shards, StoredWeight, is_sharded
from t2.weights.targets import Linear, matrices_of, plain_targets, select_targets
from t2.weights.tensor_names import tensor_names

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
    try:
        Checkpoint(folder, torch.float32).weights("all-linear")
    except FileFormatError:
        return True  # whoever reads it says what is wrong
    except ValueError:
        return False  # transformers makes some of its tensors while it loads them
    return True


def target_weights(
    name_or_path: str | Path, target_modules: str | Sequence[str], *, stream: Stream = "auto", dtype: torch.dtype
) -> Mapping[str, Tensor | StoredWeight | Dequantized]:
    """The target matrices [out, in] of a model by module name, as `decompose_weights` takes them; `stream` as above."""
    if streams(name_or_path, stream):
        return Checkpoint(checkpoint_folder(name_or_path), dtype).weights(target_modules)
    model, _ = load(name_or_path, dtype=dtype)
    finish_loading(model)
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
        self.names = tensor_names(self.skeleton, self.shards.shapes)
        self._like = {name: torch.empty_like(tensor) for name, tensor in self.skeleton.state_dict().items()}

    def weights(self, target_modules: str | Sequence[str]) -> dict[str, StoredWeight]:
        """The target matrices by module name; reads none of them."""
        unfuse(self.skeleton, target_modules, on_meta=True)
        targets, experts = plain_targets(self.skeleton, target_modules, on_meta=True), parents_of(self.skeleton)
        chosen = {experts[name][0] for name in targets if name in experts}
        if missing := [name for name, (of, _) in experts.items() if of in chosen and name not in targets]:
            raise ValueError(
                f"target_modules: expected all layers of routed experts, or none, where weights stream; got all but "
                f"{', '.join(missing[:3])}"
            )
        return {
            name: self._of_expert(name, *experts[name]) if name in experts else self._stored(name, layer)
            for name, layer in targets.items()
        }

    def _stored(self, module: str, layer: Linear) -> StoredWeight:
        name = self.names.own.get(f"{module}.weight")
        if name is None:
            raise self._missing(f"{module}.weight")
        stored = StoredWeight(self.shards, name, layer.weight.dtype, not isinstance(layer, nn.Linear))
        if self.shards.shapes[name] != tuple(layer.weight.shape):
            raise FileFormatError(
                f"{self.folder}: expected {name} of shape {list(layer.weight.shape)} by its config, "
                f"got {list(self.shards.shapes[name])}"
            )
        return stored

    def _of_expert(self, name: str, of: str, experts: UnfusedExperts) -> StoredWeight:
        """A layer of a block's routed experts, which the checkpoint has by itself or in one tensor with others."""
        tensor, part, expert, rows = experts.source(name.removeprefix(f"{of}."))
        whole, transposed = f"{of}.{tensor}", experts.form.is_transposed
        dtype = self._like[whole].dtype
        if whole in self.names.own:
            stored = StoredWeight(self.shards, self.names.own[whole], dtype, transposed, expert, rows)
        elif (part, expert) in self.names.joined.get(whole, {}) and not transposed:
            stored = StoredWeight(self.shards, self.names.joined[whole][part, expert], dtype)
        else:
            raise self._missing(whole)
        expected = tuple(self.skeleton.get_submodule(name).weight.shape)  # type: ignore[arg-type]
        if len(self.shards.shapes[stored.name]) != 2 + (stored.index is not None) or stored.shape != expected:
            raise FileFormatError(
                f"{self.folder}: expected {list(expected)} by its config for {name}, got {stored.name} of shape "
                f"{list(self.shards.shapes[stored.name])}"
            )
        return stored

    def _missing(self, tensor: str) -> ValueError:
        return ValueError(
            f"model: expected {tensor} in {self.folder}, found no tensor of that name; a checkpoint that "
            "transformers converts while loading needs `t2.load` (stream: no)"
        )

    def _holding(self, targets: Iterable[str]) -> list[str]:
        """The model's tensors that hold these targets."""
        experts, tensors = parents_of(self.skeleton), dict[str, None]()
        for name in targets:
            of, module = experts.get(name, (name, None))
            own = "weight" if module is None else module.source(name.removeprefix(f"{of}."))[0]
            tensors[f"{of}.{own}"] = None
        return list(tensors)

    def load_rest(self, weights: dict[str, StoredWeight], device: torch.device) -> PreTrainedModel:
        """The model with everything but the targets in memory, those on the meta device.

        transformers loads it, so that ties, buffers and dtypes are its own. What it is told of a target is a tensor
        of the right shape that is one number in memory.
        """
        state: dict[str, Any] = {name: Lazy(self.shards, name) for name in self.shards.shapes}
        told = self._holding(weights)
        for tensor in told:
            for name in (self.names.own.get(tensor, tensor), *self.names.joined.get(tensor, {}).values()):
                state.pop(name, None)
            like = self._like[tensor]
            state[tensor] = torch.zeros((), dtype=like.dtype).expand(like.shape)
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
        empty = {}
        for tensor in told:  # so that nothing of their size moves to the device
            owner, _, name = tensor.rpartition(".")
            module = model.get_submodule(owner)
            empty[module, name] = getattr(module, name)
            setattr(module, name, None)
        model = model.to(device).eval()
        for (module, name), weight in empty.items():
            meta = torch.empty_like(weight, device="meta")
            setattr(module, name, nn.Parameter(meta, requires_grad=weight.requires_grad))
        return cast(PreTrainedModel, model)
