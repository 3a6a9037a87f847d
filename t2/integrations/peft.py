"""SVF as a method of PEFT: `get_peft_model(model, SVFConfig(...))`, adapters beside each other, mixed batches.

Importing this module registers the method, so that `PeftModel.from_pretrained` knows files of it too. An adapter holds
z - 1 for every decomposed matrix, which rounding to 16 bits does not hurt; adapters of a layer share its factors, which
are no part of a saved adapter: loading decomposes the base again, or finds it in the factor cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from t2.experts.expert import Expert
from t2.experts.layout import Layout, fingerprint
from t2.experts.support import resolve
from t2.weights.factor_cache import FactorCache, decompose_weights, weight_key
from t2.weights.targets import Linear, as_stored, weight_matrix, why_unsuitable
from t2kernels import FactoredWeight, decompose

METHOD = "SVF"
BASE = "__base__"
"""PEFT's name for rows of a mixed batch that run without an adapter."""
STORAGE = ("float32", "bfloat16", "float16", "int8")


@dataclass
class SVFConfig(PeftConfig):
    """Options of an SVF adapter.

    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`;
        "all-linear" is the default.
    factor_dtype: storage of the factors: float32, bfloat16, float16 or int8.
    bf16_products: rounds activations to bfloat16 before they meet bfloat16 factors, where the processor has that dot
        product.
    support: None trains z at every component, and a layer runs U diag(s z) Vh x. A number of leading components, or a
        list of components by module name, trains z there alone, and a layer adds that to what its base layer computes.
    cache: keeps factors in the factor cache, under `t2kernels.files.cache_root()`.

    Adapters of one model share factors: all but the choice of modules has to be the same for them.
    """

    target_modules: list[str] | str | None = field(default="all-linear")
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    factor_dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    bf16_products: bool = False
    support: int | dict[str, list[int]] | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = METHOD
        if self.factor_dtype not in STORAGE:
            raise ValueError(f"factor_dtype: expected one of {', '.join(STORAGE)}, got {self.factor_dtype!r}")
        if isinstance(self.support, int) and self.support < 1:
            raise ValueError(f"support: expected None, an integer >= 1 or components by module, got {self.support}")
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            setattr(self, name, set(given) if isinstance(given, list) else given)
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("layers_pattern: expected layers_to_transform beside it, got none")


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """The adapters of a batch: each name once, and for each row the place of its name."""

    names: tuple[str, ...]
    slots: Tensor

    @classmethod
    def of(cls, names: Sequence[str], device: torch.device) -> MixedBatch:
        distinct = tuple(dict.fromkeys(names))
        return cls(distinct, torch.tensor([distinct.index(name) for name in names], device=device))


class SVFLinear(nn.Module, BaseTunerLayer):
    """A linear layer with the factors of its weight, and z - 1 of every adapter."""

    adapter_layer_names = ("svf_offset",)
    other_param_names = ()

    def __init__(self, base_layer: Linear, adapter_name: str, name: str, config: SVFConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.name = name
        self.svf_offset = nn.ParameterDict()
        self._disable_adapters = False
        self._active_adapter: Any = adapter_name
        self.merged_adapters: list[str] = []
        self._before_merge: Tensor | None = None
        self._kept: tuple[MixedBatch, Tensor] | None = None
        weight = weight_matrix(base_layer)
        self.out_features, self.in_features = weight.shape
        self.options = _options(config)
        self.svf_factors = self._packed(weight, config)
        self.update_layer(adapter_name, config, **kwargs)

    def _packed(self, weight: Tensor, config: SVFConfig) -> FactoredWeight:
        if config.cache:
            cache = FactorCache()
            self.key = decompose_weights({self.name: weight}, cache, progress=False)[self.name].key
            u, s, vh = (factor.to(weight.device) for factor in cache.load(self.key))
        else:
            self.key = weight_key(weight)
            u, s, vh = decompose(weight)
        kept = _components(config.support, self.name, len(s))
        self.components: Tensor | None = kept
        if kept is not None:
            own = kept.to(s.device)
            u, s, vh = u[:, own], s[own], vh[own]
        dtype = getattr(torch, config.factor_dtype)
        packed = FactoredWeight.pack(
            u, s, vh, dtype=dtype, bf16_products=config.bf16_products, float16_head=kept is None
        )
        packed._non_persistent_buffers_set.update(packed._buffers)  # an adapter is saved without them
        return packed

    def update_layer(self, adapter_name: str, config: SVFConfig, inference_mode: bool = False, **kwargs: Any) -> None:
        """Adds an adapter, which is the base."""
        if _options(config) != self.options:
            raise ValueError(
                f"peft_config: expected {self.options} as the adapters that are there have, got {_options(config)}"
            )
        zeros = torch.zeros(self.svf_factors.rank, device=self.svf_factors.s.device)
        self.svf_offset[adapter_name] = nn.Parameter(zeros)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # Products

    def forward(self, x: Tensor, *args: Any, mixed: MixedBatch | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            if mixed is not None:
                raise ValueError("adapter_names: expected adapters that are enabled and not merged")
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if mixed is not None:
            if len(x) != len(mixed.slots):
                raise ValueError(
                    f"adapter_names: expected one for each of the {len(x)} rows of {self.name}, got {len(mixed.slots)}"
                )
            return self._run(x, self._table(mixed), mixed.slots)
        offsets = [self.svf_offset[name] for name in self.active_adapters if name in self.svf_offset]
        if not offsets:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        return self._run(x, self._scales(sum(offsets[1:], offsets[0])).unsqueeze(0), self._first(x))

    def _run(self, x: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.components is None:
            return self.svf_factors.linear_unchecked(x, scales, slots, self.bias)
        y: Tensor = self.base_layer(x)
        return y + self.svf_factors.linear_unchecked(x, scales, slots).to(y.dtype)

    def _scales(self, offset: Tensor) -> Tensor:
        s = self.svf_factors.s
        return s * (1 + offset.float()) if self.components is None else s * offset.float()

    def _first(self, x: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=x.device)

    def _table(self, mixed: MixedBatch) -> Tensor:
        """A row of scales for each name; made once for a call of the model, all steps of `generate` included."""
        if self._kept is None or self._kept[0] is not mixed:
            zeros = torch.zeros_like(self.svf_factors.s)
            offsets = [self.svf_offset[name].detach() if name in self.svf_offset else zeros for name in mixed.names]
            self._kept = mixed, torch.stack([self._scales(offset) for offset in offsets])
        return self._kept[1]

    # Dense weights

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W [out, in] of an adapter, float32."""
        u, s, vh = self.svf_factors.factors()
        return (u * (s * self.svf_offset[adapter].detach().float())) @ vh

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight; `unmerge` puts back the weight that was there, bit for bit."""
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.svf_offset:
                continue
            base: Any = self.get_base_layer()
            weight = weight_matrix(base)
            merged = weight.float() + self.get_delta_weight(adapter)
            if safe_merge and not bool(merged.isfinite().all()):
                raise ValueError(f"adapter: expected finite merged weights, got NaN or infinity from {adapter!r}")
            if self._before_merge is None:
                self._before_merge = weight.detach().clone()
            base.weight.data = as_stored(base, merged.to(weight.dtype))
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        if self._before_merge is not None:
            base: Any = self.get_base_layer()
            base.weight.data = as_stored(base, self._before_merge).to(base.weight.device, base.weight.dtype)
        self._before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "svf." + super().__repr__()


def _options(config: SVFConfig) -> dict[str, Any]:
    """Options that adapters of one layer share."""
    return {name: getattr(config, name) for name in ("factor_dtype", "bf16_products", "support")}


def _components(support: int | Mapping[str, Sequence[int]] | None, name: str, rank: int) -> Tensor | None:
    if support is None:
        return None
    if isinstance(support, int):
        return torch.arange(min(support, rank))
    if name not in support:
        raise ValueError(f"support: expected components of {name}, got those of {list(support)[:3]} ...")
    kept = torch.tensor(sorted(set(support[name])), dtype=torch.int64)
    if not len(kept) or int(kept[0]) < 0 or int(kept[-1]) >= rank:
        raise ValueError(f"support: expected components of {name} from 0 to {rank - 1}, got {list(support[name])[:5]}")
    return kept


class SVFTuner(BaseTuner):
    """PEFT's model of the method; `get_peft_model` makes one."""

    prefix = "svf_"
    tuner_layer_cls = SVFLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 — as the base class declares it
    _bar: Any = None

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        if isinstance(target, SVFLinear):
            target.update_layer(adapter_name, config, inference_mode=config.inference_mode)
            return
        is_linear = isinstance(target, nn.Linear | Conv1D)  # another method's layer is not
        if (why := why_unsuitable(target) if is_linear else f"a {type(target).__name__}") is not None:
            raise ValueError(f"target_modules: expected linear layers, got {current_key}: {why}")
        layer: Any = target
        new = SVFLinear(layer, adapter_name, current_key, config, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)
        if self._bar is not None:
            self._bar.update()

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PEFT does it, with a progress bar of the layers that are decomposed."""
        with tqdm(desc="decompose", unit="layer", delay=2) as self._bar:
            super().inject_adapter(*args, **kwargs)
        self._bar = None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives the layers `adapter_names`, as PEFT's LoRA does: one for each row, and for each of its beams."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: expected a model in eval mode, got one in training mode")
        layers = [module for module in self.modules() if isinstance(module, SVFLinear)]
        known = {BASE}.union(*(layer.svf_offset for layer in layers))
        if unknown := sorted(set(names) - known):
            raise ValueError(f"adapter_names: expected adapters of this model, got {', '.join(map(repr, unknown))}")
        beams, device = kwargs.get("num_beams") or 1, layers[0].svf_factors.s.device
        for_rows, for_beams = list(names), [name for name in names for _ in range(beams)]
        rows, all_beams = MixedBatch.of(for_rows, device), MixedBatch.of(for_beams, device)
        two_parts = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        inside = set(self.model.get_encoder().modules()) if beams > 1 and two_parts else set()
        handles = []
        for layer in layers:
            hook = partial(_give, mixed=rows if layer in inside else all_beams)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                hook = partial(_give, adapter_names=for_rows if module in inside else for_beams)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds the adapter z - 1 = sum of w (z_a - 1), as a frozen one; with weights that add up to 1, z = sum w z_a.

        Raises:
            ValueError: a name that is no adapter or is taken, as many weights as adapters are not there, or adapters
                that train modules of their own (modules_to_save).
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: expected a new name, got {adapter_name!r}")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters: expected adapters of this model, got {', '.join(map(repr, unknown))}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"weights: expected one for each of the {len(adapters)} adapters, got {len(weights)}")
        saved = [m for m in self.modules() if isinstance(m, ModulesToSaveWrapper)]
        if any(name in module.modules_to_save for module in saved for name in adapters):
            raise ValueError("adapters: expected adapters without modules_to_save, got one with")
        layers = [module for module in self.modules() if isinstance(module, SVFLinear)]
        layers = [layer for layer in layers if any(name in layer.svf_offset for name in adapters)]
        config: Any = self.peft_config[adapters[0]]
        modules = {"target_modules": [layer.name for layer in layers], "exclude_modules": None}
        modules |= {"layers_to_transform": None, "layers_pattern": None}
        self.peft_config[adapter_name] = replace(config, **modules, inference_mode=True)
        self.inject_adapter(self.model, adapter_name)
        for layer in layers:
            mixed = layer.svf_offset[adapter_name].requires_grad_(False)
            for name, weight in zip(adapters, weights, strict=True):
                if name in layer.svf_offset:
                    mixed += weight * layer.svf_offset[name].detach()


def _give(module: nn.Module, args: Any, kwargs: dict[str, Any], **more: Any) -> Any:
    return args, kwargs | more


# Experts of this package


def _layers(model: PeftModel) -> dict[str, SVFLinear]:
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, SVFTuner):
        raise TypeError(f"model: expected a PeftModel of the method {METHOD}, got {type(model).__name__}")
    tuner: Any = model.base_model
    return {name: module for name, module in tuner.model.named_modules() if isinstance(module, SVFLinear)}


def layout_of(model: PeftModel) -> Layout:
    """The layout of experts for the matrices that a PEFT model decomposed."""
    layers = _layers(model)
    return Layout(
        tuple(layers),
        tuple(min(layer.out_features, layer.in_features) for layer in layers.values()),
        fingerprint({name: layer.key for name, layer in layers.items()}),
        str(getattr(model.get_base_model(), "name_or_path", "") or type(model.get_base_model()).__name__),
    )


def expert_of(model: PeftModel, adapter_name: str = "default") -> Expert:
    """An adapter as a `t2.Expert`, which `SVFModel.add_expert`, banks and the server take.

    Raises:
        ValueError: there is no such adapter, or it trains other modules too (modules_to_save).
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name: expected one of {list(model.peft_config)}, got {adapter_name!r}")
    config: Any = model.peft_config[adapter_name]
    if config.modules_to_save:
        raise ValueError("adapter_name: expected an adapter of z alone, got one with modules_to_save")
    layout, z = layout_of(model), []
    for layer in _layers(model).values():
        own = torch.ones(min(layer.out_features, layer.in_features))
        if adapter_name in layer.svf_offset:
            offset = layer.svf_offset[adapter_name].detach().float().cpu()
            own[slice(None) if layer.components is None else layer.components] += offset
        z.append(own)
    return Expert(torch.cat(z), layout, {"from": f"PEFT adapter {adapter_name}"})


@torch.no_grad()
def load_expert(model: PeftModel, expert: Expert, adapter_name: str) -> None:
    """Gives an adapter, which is added unless it is there, the values of a `t2.Expert`.

    Raises:
        ValueError: an expert of other matrices or another base, one that changes components off the support, or
            modules that the adapter has not.
    """
    layers, layout, is_new = _layers(model), layout_of(model), adapter_name not in model.peft_config
    layout.check_same(expert.layout, "expert")
    offsets = {}
    for name, layer in layers.items():
        whole = expert.z[layout.window(name)] - 1
        own = whole if layer.components is None else whole[layer.components]
        if off := int(whole.count_nonzero() - own.count_nonzero()):
            raise ValueError(f"expert: expected z = 1 off the support, got {off} other numbers in {name}")
        if is_new or adapter_name in layer.svf_offset:
            offsets[name] = own
        elif bool(own.any()):
            raise ValueError(f"adapter_name: expected an adapter with {name}, got {adapter_name!r} without it")
    if is_new:
        config: Any = next(iter(model.peft_config.values()))
        model.add_adapter(adapter_name, replace(config, target_modules=list(layers), modules_to_save=None))
    for name, own in offsets.items():
        layers[name].svf_offset[adapter_name].copy_(own)


def support_by_module(positions: Any, layout: Layout) -> dict[str, list[int]]:
    """A support as `SVFConfig` takes it: components by module name, of anything that `SVFConfig(support=)` of
    `t2.SVFModel` takes (a number, a share, a file or folder of experts, positions in z)."""
    found = resolve(positions, layout)
    by_name = {}
    for name in layout.names:
        window = layout.window(name)
        own = found[(found >= window.start) & (found < window.stop)]
        by_name[name] = (own - window.start).tolist()
    return by_name


def register() -> None:
    """Makes PEFT know the method. Its own `register_peft_method` takes only names of its enumeration."""
    mappings: Any = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SVFConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SVFTuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SVFTuner.prefix),
    )
    for mapping, value in mappings:
        if mapping.setdefault(METHOD, value) is not value:
            raise RuntimeError(f"PEFT has another method of the name {METHOD}")


register()
