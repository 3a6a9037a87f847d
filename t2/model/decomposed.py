"""The decomposed layers of one model: put in place of its linear layers, and taken out again bit for bit."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2.experts.layout import fingerprint, layout_of
from t2.experts.registry import ExpertRegistry
from t2.experts.slots import SlotTable
from t2.experts.support import resolve
from t2.model.attention import give_back, take_over
from t2.model.config import FactorSource, SVFConfig
from t2.model.layers import Packed, RoutedLinear, SharedInput, pack, plain_linear, unpack
from t2.model.routing import Router
from t2.model.sharding import Sharding
from t2.model.tensor_parallel import Division, divisions
from t2.weights.factor_cache import FactorCache, decompose_weights, weight_key
from t2.weights.files import raw_bytes
from t2.weights.fused_experts import UnfusedExperts
from t2.weights.quantized import (
    Dequantized,
    QuantizedBase,
    activation_dtype,
    device_of_layer,
    is_quantized,
    without_quantization,
)
from t2.weights.targets import (
    Linear,
    as_stored,
    groups_of_one_input,
    language_modules,
    matrices_of,
    other_linears,
)
from t2kernels import DeltaWeight, FactoredWeight, Factors, decompose
from t2kernels.packing import DENSE_STORAGE_DTYPES, EIGHT_BITS, GPU_STORAGE_DTYPES, INT4

WeightReaders = Mapping[str, Callable[[], Tensor]]
"""Functions that read the target weights [out, in], by module name."""


@dataclass
class DecomposedLayer:
    """One decomposed layer, the key of its weight in the factor cache, and the weight [out, in] without a cache."""

    layer: RoutedLinear
    key: str
    weight: Tensor | None


class DecomposedLayers:
    """Decomposes target layers of `model` in place and holds what they share: layout, slot table, router, experts.

    Args:
        readers: as `weights` of `SVFModel`: for a model whose target weights are on the meta device.
        factors: as in `SVFModel`.

    Raises:
        TypeError, ValueError: readers or factors that do not fit the targets or the cache; a storage dtype that needs
            a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SVFConfig,
        targets: Mapping[str, nn.Module],
        readers: WeightReaders | None,
        factors: FactorSource | None,
    ) -> None:
        if readers is not None and (unknown := targets.keys() - readers.keys()):
            raise ValueError(f"weights: expected one for each target layer, got none for {sorted(unknown)[:3]}")
        if factors is not None:
            _check_source(factors, targets)
        device = device_of_layer(next(iter(targets.values())))
        if device.type == "meta":
            device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        known = DENSE_STORAGE_DTYPES if device.type == "cpu" else GPU_STORAGE_DTYPES
        if config.dtype not in (None, *known):
            raise TypeError(f"dtype: expected one of {known} on {device}, got {config.dtype}")
        if config.mesh is not None:
            _check_divisible(model, targets)
        self.model, self.config, self.device = model, config, device
        self.readers, self.factors = readers, factors
        self.cache = FactorCache(config.cache_dir) if config.cache else None
        self.layers: dict[str, DecomposedLayer] = {}
        self.packed: dict[str, nn.Module] = {}
        self.divisions: dict[str, Division] = {}

    @property
    def routed(self) -> dict[str, RoutedLinear]:
        """The layers that stand in the model, by module name."""
        return {name: layer.layer for name, layer in self.layers.items()}

    # In

    def insert(self, targets: Mapping[str, nn.Module]) -> None:
        """Decomposes these layers and puts the result in their place; on an error the model is as it was.

        Where weights are read one by one the model is unusable after an error.
        """
        matrices = matrices_of(self.model, targets)
        if self.cache is not None:
            sources: Mapping[str, Tensor | Callable[[], Tensor]] = matrices
            if self.readers is not None:
                sources = {name: self.readers[name] for name in targets}
            done = decompose_weights(sources, self.cache, progress=self.config.progress)
            keys = {name: entry.key for name, entry in done.items()}
        elif self.factors is None:
            keys = {name: weight_key(_in_memory(weight)) for name, weight in matrices.items()}
        else:
            keys = dict.fromkeys(matrices, "")  # until they are there
        self.layout = layout_of(self.model, matrices, keys)
        self._by_key: dict[str, Callable[[], Tensor]] = {}
        if self.readers is not None:
            self._by_key = {keys[name]: self.readers[name] for name in targets}
        else:
            self._by_key = {keys[name]: each for name, each in matrices.items() if isinstance(each, Dequantized)}
        if self.config.tensor_parallel is not None:
            shapes = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}
            self.divisions = divisions(self.model, shapes, self.config.tensor_parallel)
        del matrices  # views that would keep every dense weight alive while the factors are loaded
        slots = (64 if self.device.type == "cuda" else 8) if self.config.slots is None else self.config.slots
        sigma = torch.empty(self.layout.R, device=self.device)
        try:
            support = None if self.config.support is None else resolve(self.config.support, self.layout)
            self.table = SlotTable(self.layout, sigma, slots, support)
            self.router = Router(self.table)
            sharding = None
            if self.config.shard is not None:
                sharding = Sharding(self.model, targets, self.config.shard)
            bar = tqdm(targets.items(), desc="pack", unit="matrix", delay=2, disable=not self.config.progress)
            for index, (name, layer) in enumerate(bar):
                self._replace(index, name, layer, keys[name])
                if sharding is not None:
                    sharding.placed(name)
            if sharding is not None:
                sharding.finish()
            self._share_inputs()
            if self.config.pack_others:
                self._pack_others()
            if self.device.type == "cpu":
                take_over(language_modules(self.model).values())
        except BaseException:
            if self.readers is None and self.config.shard is None:
                self.remove()
            raise
        if self.factors is not None:
            made = fingerprint({name: layer.key for name, layer in self.layers.items()})
            self.layout = self.table.layout = replace(self.layout, fingerprint=made)
        self.registry = ExpertRegistry(self.layout, self.table)
        self.table.reset()
        self.router = Router(self.table)
        for layer in self.routed.values():
            layer.router = self.router
        self.table.bind(list(self.routed.values()))

    def _replace(self, index: int, name: str, layer: nn.Module, key: str) -> None:
        (matrix,) = matrices_of(self.model, {name: layer}).values()
        weight, source = _in_memory(matrix), self.factors
        if source is not None:
            factors = _check_factors(name, source(name, weight) if callable(source) else source[name](), weight)
            key = _factors_key(factors)
        elif self.cache is not None:
            factors = self.cache.load_or_redo(key, self._by_key.get(key, weight))
        else:
            factors = decompose(weight)
        factors = Factors(*(factor.to(self.device) for factor in factors))  # packed there, as its kernels read them
        self.table.sigma[self.layout.window(name)] = factors.s
        stored: Tensor | nn.Module = QuantizedBase(layer) if is_quantized(layer) else weight
        if weight.is_meta and self.table.support is not None:
            assert self.cache is not None
            stored = self.cache.load_weight_or(key, self._by_key.get(key)).to(self.device)
        packed = self._pack(name, stored, factors, self.config.dtype or weight.dtype, self.table.support)
        del factors, stored, matrix
        dense = None if self.cache else weight.clone()
        del weight
        routed = RoutedLinear(index, name, packed, layer, self.router, self.divisions.get(name))
        self.layers[name] = DecomposedLayer(routed, key, dense)
        self.model.set_submodule(name, routed)

    def _pack(
        self, name: str, weight: Tensor | nn.Module, factors: Factors, dtype: torch.dtype, support: Tensor | None
    ) -> FactoredWeight | DeltaWeight:
        u, s, vh = factors
        rounded, division = self.config.bf16_products, self.divisions.get(name)
        if division is not None:
            u, vh = division.rows_of(u), division.columns_of(vh)
        if support is None:
            return FactoredWeight.pack(u, s, vh, dtype=dtype, bf16_products=rounded)
        if division is not None:
            assert isinstance(weight, Tensor)
            weight = division.columns_of(division.rows_of(weight))
        own = _within(support, self.layout.window(name))
        return DeltaWeight.pack(weight, u[:, own], s[own], vh[own], dtype=dtype, bf16_products=rounded)

    def take_support(self, positions: Tensor) -> None:
        """Packs layers of the factored form anew in the delta form; experts stay, each in a slot of another table.

        On an error everything is as it was.
        """
        self._check_whole("take_support")
        support = resolve(positions, self.layout).to(self.device)
        table = SlotTable(self.layout, self.table.sigma, len(self.table.table), support)
        registry = ExpertRegistry(self.layout, table)
        for name in self.registry:
            registry.add(name, self.registry[name], strict=False)
        packed = {}
        for name, layer in self.routed.items():
            weight, factors = self.dense(name)
            base = QuantizedBase(layer.__dict__["module"]) if layer.keeps_module else weight
            packed[name] = self._pack(name, base, factors, layer.weight.dtype, support)
        self.table, self.registry, self.router = table, registry, Router(table)
        self.config = replace(self.config, form="delta", support=support.cpu())
        for name, layer in self.routed.items():
            layer.weight, layer.router, layer.shared_input = packed[name], self.router, None
            if layer.keeps_module:
                layer.bias = None  # the module, which is the weight's base now, adds it
        self._share_inputs()
        self.table.bind(list(self.routed.values()))

    def _share_inputs(self) -> None:
        for names in groups_of_one_input(self.layers):
            members = [self.layers[name].layer for name in names]
            if len({m.weight.kind for m in members}) == 1 and all(
                m.division is None or m.division.hands_on for m in members
            ):
                SharedInput(members)

    def _pack_others(self) -> None:
        """Their weights stay in memory beside the packed ones; a tied output embedding is no extra copy."""
        for name, layer in other_linears(self.model).items():
            dtype = self.config.dtype or layer.weight.dtype
            if dtype == INT4:
                dtype = torch.uint8
            elif dtype in EIGHT_BITS:
                dtype = torch.float16 if layer.weight.dtype == torch.float32 else layer.weight.dtype
            pack(layer, dtype, self.config.bf16_products)
            self.packed[name] = layer

    def refresh(self) -> None:
        """Packs weights beside the targets again that were written to; compiled code does not look."""
        for layer in self.packed.values():
            if isinstance(layer, Packed):
                layer.refresh()

    def follow_device(self) -> bool:
        """Moves table and router to the device of the factors; False if they are there already."""
        layers = list(self.routed.values())
        device = layers[0].weight.s.device
        if device == self.table.sigma.device:
            return False
        self.table.to(device)
        self.router = Router(self.table)
        for layer in layers:
            layer.router = self.router
        return True

    # Dense weights

    def dense(self, name: str) -> tuple[Tensor, Factors]:
        """The base weight [out, in] of a layer and its factors, on its device; in the delta form the support's."""
        layer = self.layers[name]
        packed = layer.layer.weight
        if self.cache is None:
            assert layer.weight is not None
            kept = packed.change if isinstance(packed, DeltaWeight) else packed
            return layer.weight, Factors(*kept.factors())
        device, source = packed.s.device, self._by_key.get(layer.key)
        u, s, vh = (f.to(device) for f in self.cache.load_or_redo(layer.key, source))
        if self.table.support is not None:
            own = _within(self.table.support, self.layout.window(name))
            u, s, vh = u[:, own], s[own], vh[own]
        return self.cache.load_weight_or(layer.key, source).to(device), Factors(u, s, vh)

    def merged_weight(self, name: str, z: Tensor) -> Tensor:
        """W + U diag(sigma (z - 1)) Vh [out, in] of a layer, in the dtype of W, for an expert z [R]."""
        weight, (u, s, vh) = self.dense(name)
        self.table.scales_of(z)  # an error where the delta form cannot run it
        window = self.layout.window(name)
        own = z[window].to(weight.device)
        if self.table.support is not None:
            own = own[_within(self.table.support, window)]
        scale = s * (own - 1.0)
        if not scale.any():  # adding zeros would turn -0.0 into 0.0
            return weight.clone()
        return (weight.float() + (u * scale) @ vh).to(weight.dtype)

    def merged_copy(self, z: Tensor) -> nn.Module:
        """A plain copy of the model with an expert z [R] built in."""
        self._check_whole("merged_copy")
        memo: dict[int, object] = {
            id(layer.layer): self._merged_layer(name, layer, z) for name, layer in self.layers.items()
        }
        merged = copy.deepcopy(self.model, memo)
        for module in merged.modules():
            unpack(module)
        give_back(merged)
        self._now_plain(merged)
        return merged

    def _now_plain(self, merged: nn.Module) -> None:
        """Says what merging costs a quantised model, whose matrices are plain ones now."""
        without_quantization(merged)
        kept = [layer.layer for layer in self.layers.values() if layer.layer.keeps_module]
        if not kept:
            return
        dtype = activation_dtype(merged)
        size = sum(layer.in_features * layer.out_features for layer in kept)
        warnings.warn(
            f"{len(kept)} quantised matrices are plain ones of {dtype} now, with the expert built in: "
            f"{size * dtype.itemsize / 1e6:.0f} MB. Quantising the result again rounds the expert's change too; the "
            "delta form keeps the quantised base beside the expert",
            stacklevel=4,
        )

    def _merged_layer(self, name: str, layer: DecomposedLayer, z: Tensor) -> nn.Module:
        if layer.layer.keeps_module:
            return plain_linear(self.merged_weight(name, z), layer.layer.__dict__["module"]).train(layer.layer.training)
        module: Linear = layer.layer.__dict__["module"]
        plain, empty = copy.deepcopy(module), module.weight
        weight = as_stored(module, self.merged_weight(name, z)).to(empty.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=empty.requires_grad)
        return plain.train(layer.layer.training)

    def _check_whole(self, method: str) -> None:
        if self.config.shard is not None:
            raise RuntimeError(f"{method}: expected a model that is not sharded; wrap the base in one process for that")

    # Out

    def remove(self, z: Tensor | None = None) -> None:
        """Puts the linear layers back, with the base weights bit for bit or, given z [R], with an expert built in.

        All dense weights are read before any layer is put back, so a failure leaves the wrapped model whole.
        """
        self._check_whole("unload")
        weights: dict[str, Tensor | None] = {}
        for name, layer in self.layers.items():
            if z is not None:
                weights[name] = self.merged_weight(name, z)
            elif layer.layer.keeps_module:
                weights[name] = None
            elif self.cache is not None:
                weights[name] = self.cache.load_weight_or(layer.key, self._by_key.get(layer.key))
            else:
                weights[name] = layer.weight
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.layer.restored(weights[name]))
        for packed in self.packed.values():
            unpack(packed)
        give_back(self.model)
        if z is not None:
            self._now_plain(self.model)
        self.layers, self.packed = {}, {}


def _check_divisible(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    if quantized := [name for name, layer in targets.items() if is_quantized(layer)]:
        raise ValueError(
            f"shard, tensor_parallel: expected plain weights to divide over processes, got a quantised layer, "
            f"{quantized[0]}"
        )
    if any(isinstance(module, UnfusedExperts) for module in model.modules()):
        raise ValueError(
            "shard, tensor_parallel: expected a model without routed experts among the targets, whose layers are "
            f"called in groups; got {type(model).__name__}"
        )


def _in_memory(matrix: Tensor | Dequantized) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix()


def _within(support: Tensor, window: slice) -> Tensor:
    """The components of one matrix that are in the support."""
    return support[(support >= window.start) & (support < window.stop)] - window.start


def _check_source(source: FactorSource, targets: Mapping[str, nn.Module]) -> None:
    if callable(source):
        return
    if not isinstance(source, Mapping):
        raise TypeError(f"factors: expected a function or a mapping of names to functions, got {type(source).__name__}")
    if missing := targets.keys() - source.keys():
        raise ValueError(f"factors: expected one for each target layer, got none for {sorted(missing)[:3]}")
    if wrong := [name for name in targets if not callable(source[name])]:
        raise TypeError(f"factors[{wrong[0]!r}]: expected a function, got {type(source[wrong[0]]).__name__}")


def _check_factors(name: str, factors: object, weight: Tensor) -> Factors:
    if not isinstance(factors, tuple) or len(factors) != 3 or not all(isinstance(part, Tensor) for part in factors):
        raise TypeError(f"factors[{name!r}]: expected a tuple of tensors (u, s, vh), got {type(factors).__name__}")
    (out_features, in_features), rank = weight.shape, min(weight.shape)
    for part, factor, expected in zip(
        Factors._fields, factors, ((out_features, rank), (rank,), (rank, in_features)), strict=True
    ):
        if tuple(factor.shape) != expected:
            raise ValueError(f"factors[{name!r}].{part}: expected shape {list(expected)}, got {list(factor.shape)}")
    return Factors(*factors)


def _factors_key(factors: Factors) -> str:
    """An identity for factors made elsewhere, from s, the first row of U and the first column of Vh."""
    parts = (factors.s, factors.u[0], factors.vh[:, 0])
    digest = hashlib.sha256(str([tuple(part.shape) for part in factors]).encode())
    for part in parts:
        digest.update(raw_bytes(part.float()))
    return digest.hexdigest()
