"""The matrices of a model that vLLM serves: which of its layers hold them, and their factors, by its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tp_group
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.model_loader.utils import get_model_cls

from t2.experts import support
from t2.experts.layout import Layout, fingerprint
from t2.integrations.vllm.bank import BANK, SUPPORT, Bank
from t2.weights.factor_cache import FactorCache, decompose_weights
from t2.weights.files import read_safetensors
from t2.weights.streaming import Checkpoint
from t2kernels import Factors
from t2kernels.pages import collapse_pages

CHECKPOINT = "T2_CHECKPOINT"
"""Environment variable: the folder with the plain weights of a model that vLLM reads quantised."""


@dataclass(frozen=True)
class Matrix:
    """One matrix W [out, in] of a model: its name in transformers, and a function that reads it as float32."""

    name: str
    read: Callable[[], Tensor]


class ModelPlan:
    """The matrices of a model by the names that vLLM has for them.

    Args:
        folder: the model's folder, plain weights in safetensors.
        to_vllm: vLLM's name of a module that has a name in transformers.
        layout: that of the experts; None where there are none yet, which makes it all linear layers.
        positions: the support of the delta form [K]; None where there is none.
    """

    def __init__(
        self, folder: Path, to_vllm: Callable[[str], str], layout: Layout | None, positions: Tensor | None
    ) -> None:
        self.folder, self.layout, self.positions = folder, layout, positions
        self._weights = Checkpoint(folder, torch.float32).weights("all-linear" if layout is None else layout.names)
        self._by_vllm = {to_vllm(name): name for name in self._weights}
        if len(self._by_vllm) < len(self._weights):
            raise ValueError(f"model: expected a module of vLLM for each of {folder}, got several for one")
        self._cache = FactorCache()
        self._served: set[str] = set()
        self.tensors: list[Tensor] = []
        """Packed tensors of all layers."""
        self.tables: list[Tensor] = []
        """Scales of all layers, [slots + 1, r] for each matrix."""

    @classmethod
    def of(cls, config: VllmConfig) -> ModelPlan:
        """The plan of the model that this process loads, made once.

        Raises:
            FileNotFoundError, FileFormatError, ValueError: the folder, the bank or the support cannot be used.
        """
        model: Any = config.model_config
        kept: ModelPlan | None = getattr(model, "_t2_plan", None)
        if kept is None:
            mapper = getattr(get_model_cls(model), "hf_to_vllm_mapper", None)
            renames = None if mapper is None else mapper.get_rename_mapper()

            def to_vllm(name: str) -> str:
                return str(parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", renames)[0])

            layout = _layout()
            positions = None
            if layout is not None and (given := os.environ.get(SUPPORT)):
                positions = support.resolve(int(given) if given.isdecimal() else given, layout)
            folder = Path(os.environ.get(CHECKPOINT) or model.model)
            if not folder.is_dir():
                raise FileNotFoundError(f"model: expected a local folder, got {folder}")
            kept = model._t2_plan = cls(folder, to_vllm, layout, positions)
        return kept

    @classmethod
    def current(cls) -> ModelPlan:
        """The plan of the model that is being loaded."""
        return cls.of(get_current_vllm_config())

    def matrices(self, prefix: str, packed: Sequence[str]) -> list[Matrix] | None:
        """The matrices that a layer of vLLM holds, in its order; None where it holds none of the experts' matrices.

        Args:
            prefix: the layer's name in vLLM. packed: the last parts of the names of its matrices; none or one where it
                holds one under its own name.

        Raises:
            ValueError: it holds some that experts change, and others.
        """
        parent, _, last = prefix.rpartition(".")
        own = [f"{parent}.{part}" if parent else part for part in (packed if len(packed) > 1 else [last])]
        names = [self._by_vllm.get(name) for name in own]
        if not any(names):
            return None
        if missing := [name for name, known in zip(own, names, strict=True) if known is None]:
            raise ValueError(
                f"{prefix}: expected experts of all of its matrices, or of none, got experts without {missing[0]}"
            )
        return [Matrix(name, self._weights[name]) for name in names if name is not None]

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """The keys of all matrices in the factor cache, where they are then. Shows progress."""
        group = get_tp_group()
        if group.rank_in_group:
            group.barrier()
        found = decompose_weights(self._weights, self._cache, progress=group.rank_in_group == 0)
        if group.rank_in_group == 0:
            group.barrier()
        keys = {name: each.key for name, each in found.items()}
        if self.layout is not None and fingerprint(keys) != self.layout.fingerprint:
            raise ValueError(
                f"{BANK}: expected experts of the weights in {self.folder}, got some of {self.layout.base_model!r}, "
                "which has others"
            )
        return keys

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights, as experts' files have it."""
        return fingerprint(self.keys)

    def factors(self, name: str) -> Factors:
        """U [out, r], s [r] and Vh [r, in] of a matrix, float32; afterwards it counts as served."""
        self._served.add(name)
        return self._cache.load(self.keys[name])

    def components(self, name: str) -> Tensor:
        """The components of a matrix that are in the support, int64 [k].

        Raises:
            ValueError: there is no support.
        """
        if self.layout is None or self.positions is None:
            raise ValueError(
                f"{BANK}: expected experts, whose support the delta form starts with, or a support in {SUPPORT}; got "
                "none (the form that needs none is `--quantization t2_svf`)"
            )
        window = self.layout.window(name)
        own = self.positions[(self.positions >= window.start) & (self.positions < window.stop)]
        return own - window.start

    def check_served(self) -> None:
        """Once all layers are there, before the first expert.

        Raises:
            ValueError: experts change matrices that no layer of vLLM took, whose part would be left out.
        """
        collapse_pages(self.tensors)
        self.tensors.clear()
        left = [name for name in self._weights if name not in self._served]
        if left and get_pp_group().world_size == 1:
            raise ValueError(
                f"model: expected a layer of vLLM for each matrix of the experts, found none for {left[:3]}"
            )


def _layout() -> Layout | None:
    """The layout of the bank's experts, or of the support's file."""
    if os.environ.get(BANK) and (layout := Bank.from_environment().layout) is not None:
        return layout
    given = os.environ.get(SUPPORT, "")
    if given and not given.isdecimal() and Path(given).is_file():
        return Layout.from_metadata(read_safetensors(given, "support")[1], given)
    return None
