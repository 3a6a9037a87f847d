"""`SVFModel`: a model whose every request may use an expert of its own."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2.experts.expert import Expert, check_z
from t2.experts.layout import fingerprint, layout_of
from t2.experts.registry import ServedExperts
from t2.experts.slots import SlotBuffer, SlotTable
from t2.model.attention import give_back, take_over
from t2.model.kv_cache import growing_cache
from t2.model.layers import Packed, RoutedLinear, SharedInput, pack, unpack
from t2.model.routing import Route, Router, TrainedRoute
from t2.model.serving_plan import Delta, Merged, ServingPlan, cost_model
from t2.model.verify import ROUNDING, Probe, VerificationError, check
from t2.weights.factor_cache import FactorCache, decompose_weights, weight_key
from t2.weights.files import raw_bytes
from t2.weights.targets import (
    PATTERNS,
    Coverage,
    Linear,
    Unsuitable,
    as_stored,
    block_weights,
    groups_of_one_input,
    is_meant,
    language_modules,
    other_linears,
    select_targets,
    unsuitable_layers,
    weight_matrix,
)
from t2kernels import DenseWeight, FactoredWeight, Factors, decompose
from t2kernels.packing import EIGHT_BITS, GPU_STORAGE_DTYPES, STORAGE_DTYPES
from t2kernels.planner import CostModel, DeltaWeight, Phase, Plan, delta_components, plan_layer

if TYPE_CHECKING:  # strategies are made of this module's models
    from t2.adaptation.base import Adaptation, Strategy
    from t2.tasks.classify import Prompt

ExpertChoice = str | Mapping[str, float] | Expert | Tensor | None
"""What one request uses: a name, a mix of names with weights, an expert, a vector z [R], or None for the base."""

LARGE_SHARE = 0.9
"""Of the weights that `target_modules` means: a model says so where fewer are decomposed."""

FactorSource = Callable[[str, Tensor], Factors] | Mapping[str, Callable[[], Factors]]
"""Where the factors of a target come from, if not from `decompose`: (name, weight [out, in]) -> factors, or by name."""


@dataclass(frozen=True)
class SVFConfig:
    """How a model is decomposed.

    target_modules: "all-linear" (all but the output embedding), "attention" or "mlp" (layers below a module so
        named), a regular expression for the whole name, or a list of name suffixes such as ["q_proj", "v_proj"]. Of a
        model that reads images, only layers of its language model are meant.
    dtype: storage of the factors: float32, bfloat16, float16, int8, or on a GPU float8_e4m3fn; None keeps each
        weight's own.
    bf16_products: lets activations be rounded to bfloat16 before they meet bfloat16 factors, where the processor has
        that dot product: twice the arithmetic, for a drift that `benchmarks/fidelity.py` measures.
    pack_others: whether linear layers beside the targets, the output embedding first of all, run on the same kernels
        too, stored as `dtype`. Where that has 8 bits they stay as they are, float32 ones as float16: logits come
        straight out of them. What comes before the language model of one that reads images is left as it is.
    cache: True keeps factors (and the base weights, which `merge` and `detach` need) in `cache_dir` instead of
        computing them at every start; False holds the base weights in memory beside the factors.
    cache_dir: folder of the cache; None is `t2kernels.files.cache_root() / "factors"`.
    slots: rows of the slot table, 4 R bytes each: the base, every expert, and the mixes of running batches have one.
        None is 64 on a GPU (185 MB for Llama-3-8B) and 8 elsewhere. A full table doubles (`SVFModel.table_generation`).
    verify: whether a short probe runs through the model before and after (`t2.model.verify`): a dozen forward passes of
        20 tokens. Layers that fail it are left out with a warning; a model whose outputs it changes is refused. Where
        weights are read one by one there are no outputs to compare with: rows of a mixed batch are looked at alone.
    progress: whether the decomposition shows a progress bar.
    """

    target_modules: str | Sequence[str] = "all-linear"
    dtype: torch.dtype | None = None
    bf16_products: bool = False
    pack_others: bool = True
    cache: bool = True
    cache_dir: Path | str | None = None
    slots: int | None = None
    verify: bool = True
    progress: bool = True


@dataclass
class _Target:
    """A decomposed layer, and the key of its weight in the cache."""

    layer: RoutedLinear
    key: str
    weight: Tensor | None  # [out, in], only without a cache


class SVFModel(nn.Module):
    """Replaces the target layers of `model`, in place, by decomposed ones that share one slot table.

    `model` is any nn.Module; `generate` needs one that has it. The dense weights of the targets leave memory;
    `detach()` puts them back bit for bit. Everything is checked and decomposed before the model is changed.

    `layout` tells the decomposed matrices, `bank` the experts' vectors, `model` is the wrapped module.

    Args:
        config: how; default `SVFConfig()`.
        weights: functions that read the target weights [out, in], by module name, for a model that has these on the
            meta device and all else in memory: `t2.load_factored` makes both from a checkpoint. Needs a cache.
        factors: factors made elsewhere, in place of a decomposition: a function (name, weight [out, in]) -> Factors,
            or functions without arguments by module name. Needs `cache=False`. Experts belong to these factors, not to
            the weights: the layout's fingerprint is theirs.
        example_inputs: keyword arguments of a forward pass of at least two requests, for `SVFConfig.verify`. Default:
            made from the model's config, or from its first layers.

    Raises:
        TypeError, ValueError: an argument of another kind, or a model that has no layer to decompose.
        VerificationError: the model would answer otherwise when wrapped. It is as it was before.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SVFConfig | None = None,
        *,
        weights: Mapping[str, Callable[[], Tensor]] | None = None,
        factors: FactorSource | None = None,
        example_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = config or SVFConfig()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if config.dtype not in (None, *GPU_STORAGE_DTYPES):
            raise TypeError(f"dtype: expected None, float32, bfloat16, float16 or int8, got {config.dtype}")
        if config.slots is not None and (not isinstance(config.slots, int) or config.slots < 1):
            raise ValueError(f"slots: expected None or an integer >= 1, got {config.slots!r}")
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise ValueError("model: expected a plain model, got one that is wrapped already; detach() it first")
        if weights is not None and not config.cache:
            raise ValueError("cache: expected True where weights are read one by one, got False")
        if factors is not None and config.cache:
            raise ValueError("cache: expected False where factors are given, got True")
        targets = select_targets(model, config.target_modules, on_meta=weights is not None)
        if weights is not None and (unknown := targets.keys() - weights.keys()):
            raise ValueError(f"weights: expected one for each target layer, got none for {sorted(unknown)[:3]}")
        if factors is not None:
            _check_source(factors, targets)
        device = next(iter(targets.values())).weight.device
        if device.type == "meta":
            device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        if device.type == "cpu" and config.dtype not in (None, *STORAGE_DTYPES):
            raise TypeError(f"dtype: expected one of {STORAGE_DTYPES} on a CPU, got {config.dtype}, which needs a GPU")
        self.svf_config = config
        self._device = device
        self._cache = FactorCache(config.cache_dir) if config.cache else None
        self._lock = threading.RLock()
        self._strategies: dict[str, Strategy] = {}
        self.last_adaptation: Adaptation | None = None
        """Of the last `generate(adapt=...)`, pass one's seconds and reasons included."""
        self.z: nn.Parameter | None = None
        self._targets: dict[str, _Target] = {}
        self._packed: dict[str, nn.Module] = {}
        self.left_out = Unsuitable(
            {name: why for name, why in unsuitable_layers(model).items() if is_meant(name, config.target_modules)}
        )
        """Layers that `target_modules` names but that stay dense, and why."""
        self.model = model
        self.__class__ = _with_signature(type(self), type(model))
        blocks = block_weights(model, config.target_modules)
        self._wrap_verified(targets, weights, factors, example_inputs)
        self.coverage = Coverage.of(blocks, self._targets)
        """The share of the blocks' weights that became factors."""
        if self.left_out:
            warnings.warn(f"these layers stay dense: {self.left_out}", stacklevel=2)
        if (
            isinstance(config.target_modules, str)
            and config.target_modules in PATTERNS
            and self.coverage.share < LARGE_SHARE
        ):
            warnings.warn(f"target_modules={config.target_modules!r}: {self.coverage}", stacklevel=2)

    def _wrap_verified(
        self,
        targets: dict[str, Linear],
        weights: Mapping[str, Callable[[], Tensor]] | None,
        factors: FactorSource | None,
        example_inputs: Mapping[str, Any] | None,
    ) -> None:
        """Wraps the targets that pass the probe; the model is as it was if there are none."""
        model, config, probe = self.model, self.svf_config, None
        self._verified = not config.verify
        dtypes = [layer.weight.dtype for layer in targets.values()]
        rounding = max(ROUNDING[config.dtype or dtype] + ROUNDING[dtype] for dtype in dtypes)
        if config.bf16_products:
            rounding += ROUNDING[torch.bfloat16]
        self._rounding = rounding
        if config.verify and weights is None:
            probe = Probe.of(model, example_inputs)
            if probe is None:
                warnings.warn(
                    f"{type(model).__name__} was wrapped without verification: no inputs could be made for it. "
                    "example_inputs gives some; else its first call with several experts is verified",
                    stacklevel=4,
                )
            else:
                targets = self._leave_out(targets, probe.look(model, targets, rounding))
        while True:
            self._wrap(targets, weights, factors)
            if config.verify and weights is not None:
                probe = Probe.of(model, example_inputs)
                rows = {} if probe is None else probe.look_rows(model, self._layers())
                if rows:
                    raise VerificationError(f"model: expected requests in the rows of every layer. {rows}")
            if probe is None:
                return
            trouble = check(self, probe, rounding, base=weights is None and factors is None)
            if trouble is None:
                self._verified = True
                return
            if weights is not None:
                raise VerificationError(f"{type(model).__name__} can't be wrapped: {trouble.cause}")
            self._restore()
            if not trouble.names:
                raise VerificationError(
                    f"{type(model).__name__} can't be wrapped: {trouble.cause}. It is as it was; "
                    "target_modules can name fewer layers, and verify=False wraps it all the same"
                )
            targets = self._leave_out(targets, Unsuitable(dict.fromkeys(trouble.names, trouble.cause)))

    def _leave_out(self, targets: dict[str, Linear], reasons: Unsuitable) -> dict[str, Linear]:
        self.left_out.update(reasons)
        left = {name: layer for name, layer in targets.items() if name not in reasons}
        if not left:
            raise VerificationError(
                f"{type(self.model).__name__} can't be wrapped: no layer is left to decompose. {self.left_out}"
            )
        return left

    def _wrap(
        self,
        targets: dict[str, Linear],
        weights: Mapping[str, Callable[[], Tensor]] | None,
        factors: FactorSource | None,
    ) -> None:
        """Decomposes and replaces these layers."""
        model, config, device = self.model, self.svf_config, self._device
        matrices = {name: weight_matrix(layer) for name, layer in targets.items()}
        if self._cache is not None:
            sources = matrices if weights is None else {name: weights[name] for name in targets}
            done = decompose_weights(sources, self._cache, progress=config.progress)
            keys = {name: entry.key for name, entry in done.items()}
        elif factors is None:
            keys = {name: weight_key(weight) for name, weight in matrices.items()}
        else:
            keys = dict.fromkeys(matrices, "")  # until they are there
        self.layout = layout_of(model, matrices, keys)
        self._sources = {} if weights is None else {keys[name]: weights[name] for name in targets}
        del matrices  # views that would keep every dense weight alive while the factors are loaded
        slots = (64 if device.type == "cuda" else 8) if config.slots is None else config.slots
        self._table = SlotTable(self.layout, torch.empty(self.layout.R, device=device), slots)
        self.router = Router(self._table)
        try:
            bar = tqdm(targets.items(), desc="pack", unit="matrix", delay=2, disable=not config.progress)
            for index, (name, layer) in enumerate(bar):
                self._replace(index, name, layer, keys[name], factors)
            self._share_inputs()
            if config.pack_others:
                self._pack_others()
            if device.type == "cpu":
                take_over(language_modules(model).values())
        except BaseException:
            if weights is None:
                self._restore()
            raise
        if factors is not None:
            made = fingerprint({name: target.key for name, target in self._targets.items()})
            self.layout = self._table.layout = replace(self.layout, fingerprint=made)
        self._bank = ServedExperts(self.layout, self._table)
        self._table.table[:] = self._table.sigma
        self._table.bind(list(self._layers().values()))

    @property
    def bank(self) -> ServedExperts:
        """The experts' vectors by name; what is added to it or removed from it is served or is not from then on."""
        return self._bank

    def _layers(self) -> dict[str, RoutedLinear]:
        return {name: target.layer for name, target in self._targets.items()}

    def _replace(self, index: int, name: str, layer: Linear, key: str, source: FactorSource | None) -> None:
        weight, device = weight_matrix(layer), self._table.sigma.device
        if source is not None:
            factors = _check_factors(name, source(name, weight) if callable(source) else source[name](), weight)
            key = _factors_key(factors)
        else:
            factors = (
                self._cache.load_or_redo(key, self._sources.get(key, weight)) if self._cache else decompose(weight)
            )
        dtype = self.svf_config.dtype or weight.dtype
        u, s, vh = (factor.to(device) for factor in factors)  # packed there, in the layout of its kernels
        packed = FactoredWeight.pack(u, s, vh, dtype=dtype, bf16_products=self.svf_config.bf16_products)
        del factors, u, s, vh
        self._table.sigma[self.layout.window(name)] = packed.s
        dense = None if self._cache else weight.clone()
        del weight
        routed = RoutedLinear(index, name, packed, layer, self.router)
        self._targets[name] = _Target(routed, key, dense)
        self.model.set_submodule(name, routed)

    def _share_inputs(self) -> None:
        for names in groups_of_one_input(self._targets):
            members = [self._targets[name].layer for name in names]
            if len({(m.in_features, m.weight.dtype, m.weight.parts) for m in members}) == 1:
                SharedInput(members)

    def _pack_others(self) -> None:
        """Their weights stay in memory beside the packed ones; a tied output embedding is no extra copy."""
        for name, layer in other_linears(self.model).items():
            dtype = self.svf_config.dtype or layer.weight.dtype
            if dtype in EIGHT_BITS:
                dtype = torch.float16 if layer.weight.dtype == torch.float32 else layer.weight.dtype
            pack(layer, dtype, self.svf_config.bf16_products)
            self._packed[name] = layer

    def _refresh(self) -> None:
        """Packs weights beside the targets again that were written to; compiled code does not look."""
        for layer in self._packed.values():
            if isinstance(layer, Packed):
                layer.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> SVFModel:
        z = self._parameters.pop("z", None)  # float32 whatever the model is cast to: small steps would be lost
        try:
            super()._apply(fn, recurse)
        finally:
            if z is not None:
                self._parameters["z"] = z
        if self._targets:
            layers = list(self._layers().values())
            device = layers[0].weight.s.device
            if device != self._table.sigma.device:
                self._table.to(device)
                self.router = Router(self._table)
                for layer in layers:
                    layer.router = self.router
            if z is not None:
                z.data = z.data.to(device)
                if z.grad is not None:
                    z.grad.data = z.grad.data.to(device)
                self.router.default = TrainedRoute(z, self.sigma, self.layout)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Always a TypeError: nothing could say which experts a copy shares with this model."""
        raise TypeError(
            "an SVFModel can be neither copied nor pickled: merge(expert) gives a plain copy with an expert built in, "
            "detach() the base, bank.save() writes the experts; wrap another copy of the base for a second one"
        )

    @property
    def sigma(self) -> Tensor:
        """The singular values [R] float32 of all decomposed matrices, in the order of the layout."""
        return self._table.sigma

    @property
    def table_generation(self) -> int:
        """How often the slot table has moved, because it was full or the model went to another device.

        CUDA graphs that were captured at another generation read a table that is no longer there: capture them again.
        `SVFConfig.slots` makes room beforehand. Compiled models follow by themselves, and are compiled once more.
        """
        return self._table.generation

    @property
    def weight_keys(self) -> dict[str, str]:
        """The key of each decomposed weight in the factor cache, by module name."""
        return {name: target.key for name, target in self._targets.items()}

    # Experts

    def add_expert(self, name: str, expert: Expert, *, replace: bool = False, strict: bool = True) -> None:
        """Makes an expert available to requests under `name`; safe while other requests run.

        `replace` puts it in place of the one that has the name: running requests finish with the old one.
        `strict=False` accepts an expert that was made for other weights of the same layout.
        """
        self._check_attached()
        self.bank.add(name, expert, replace=replace, strict=strict)

    def remove_expert(self, name: str) -> None:
        """Takes an expert away from new requests; requests that run with it finish with it."""
        self._check_attached()
        self.bank.remove(name)

    def z_of(self, choice: ExpertChoice) -> Tensor:
        """The vector z [R] float32 that a request with this choice runs with; a given tensor keeps its gradient."""
        if choice is None:
            return torch.ones(self.layout.R)
        if isinstance(choice, str):
            return self.bank[choice].z
        if isinstance(choice, Mapping):
            return self.bank.mix(choice)
        if isinstance(choice, Expert):
            self.layout.check_same(choice.layout, "experts")
            return choice.z
        if isinstance(choice, Tensor):
            return check_z("experts", choice, (self.layout.R,)).float()
        raise TypeError(
            "experts: expected a name, a mapping of names to weights, an Expert, a tensor z [R] or None for each "
            f"request, got {type(choice).__name__}"
        )

    @contextmanager
    def route(self, experts: ExpertChoice | Sequence[ExpertChoice], plan: ServingPlan | None = None) -> Iterator[None]:
        """Within the block, request i of a batch runs with `experts[i]`.

        A batch of B entries also serves k * B rows (beams, return sequences), each entry repeated k times in place.
        A single choice that is not a list serves every row. Where an entry is a tensor that requires grad, the
        gradient reaches it; activation checkpointing is turned on by this model's `activation_checkpointing_enable`, or
        else backward is called inside the block. Routes belong to the thread or task that entered them, and may be
        nested.

        Batches of one size that run one after the other have their slots at the same address, and all experts are rows
        of one table. So a model that was compiled, and a CUDA graph that was captured inside of a route, run with the
        experts of the route around them, until `table_generation` changes. Enter the route before the capture.

        With a `plan` (inference only) layers run in the form it chose; a ValueError says if it was made for others.

        Raises:
            RuntimeError: the block has ended, and no layer has run with its experts. The model may have run in another
                thread, where the route is not in force.
        """
        self._check_attached()
        choices = _choices(experts)
        with ExitStack() as held:
            route, buffer = self._resolve(choices, held)
            if plan is not None:
                self._check_plan(plan, choices)
                forms = {index: form.bind(self._table.table) for index, form in self._built(plan).items()}
                route = Route(route.slots, forms=forms)
            held.enter_context(self.router.within(route))
            yield
            if buffer is not None and route.slots.is_cuda:  # a captured graph reads its buffer unseen
                route.was_read = buffer.was_read = route.was_read or buffer.was_read
            if not route.was_read and any(choice is not None for choice in choices):
                raise RuntimeError(
                    "route: expected a layer to run with these experts within the block, but none has; the model ran "
                    "in another thread, or not at all. Enter the route in the thread that calls the model"
                )

    def _resolve(self, choices: list[ExpertChoice], held: ExitStack) -> tuple[Route, SlotBuffer | None]:
        device = self._table.sigma.device
        if any(isinstance(choice, Tensor) and choice.requires_grad for choice in choices):
            scales = torch.stack([self._table.sigma * self.z_of(choice).to(device) for choice in choices])
            return Route(torch.arange(len(choices), device=device), scales, self.layout), None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("route: expected to be entered before the capture of a CUDA graph, got one inside of it")
        slots: dict[object, int] = {None: SlotTable.BASE}
        with self._lock:
            for choice in choices:
                key = self._key(choice)
                if key in slots:
                    continue
                if isinstance(choice, str):
                    slots[key] = self.bank.retain(choice)
                else:
                    slots[key] = self._table.allocate(self.z_of(choice))
                held.callback(self._table.release, slots[key])
        self._table.wait_for_writes()
        buffer = self.router.buffers.take([slots[self._key(choice)] for choice in choices])
        held.callback(self.router.buffers.give_back, buffer)
        return Route(buffer.slots), buffer

    @staticmethod
    def _key(choice: ExpertChoice) -> object:
        """Equal for choices that can share a slot."""
        if isinstance(choice, Mapping):
            return tuple(sorted((str(name), weight) for name, weight in choice.items()))
        return choice if choice is None or isinstance(choice, str) else id(choice)

    # An expert in training

    def start_training(self, start: ExpertChoice = None) -> nn.Parameter:
        """Makes an expert the one trainable parameter `z` [R] of this module, and returns it.

        Until `finish_training` it takes the base's place: calls without `experts` outside a `route` run with it, those
        of the wrapped model included, and a backward pass reaches it. So any loop that trains an nn.Module trains the
        expert, transformers' and TRL's trainers among them. Nothing else of the model requires grad.

        Args:
            start: what z starts as; None is the base, z = 1.
        """
        self._check_attached()
        if self.z is not None:
            raise RuntimeError("an expert is in training already; finish_training() ends that")
        first = self.z_of(start).detach().to(self.sigma.device).clone()
        self.requires_grad_(False)
        self.z = nn.Parameter(first)
        self.router.default = TrainedRoute(self.z, self.sigma, self.layout)
        return self.z

    def finish_training(self, metadata: Mapping[str, str] | None = None) -> Expert:
        """The expert as it was trained since `start_training`; calls without `experts` are the base's again."""
        if self.z is None:
            raise RuntimeError("no expert is in training; start_training() begins that")
        trained, self.z, self.router.default = Expert(self.z, self.layout, metadata), None, None
        return trained

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """As the wrapped model's method; layers run again in the backward pass find the route of their forward pass.

        Raises:
            ValueError: reentrant checkpoints are asked for, which have no place for a route.
        """
        arguments = {"use_reentrant": False} | dict(activation_checkpointing_kwargs or {})
        if arguments["use_reentrant"]:
            raise ValueError("use_reentrant: expected False, got True")
        model: Any = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(arguments | {"context_fn": self._checkpoint_contexts}, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The name of `activation_checkpointing_enable` before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For the forward pass, and for when it is run again, which may be in another thread."""
        route = self.router.current
        return self.router.within(route), self.router.within(route)

    # Plans

    def plan(
        self,
        experts: ExpertChoice | Sequence[ExpertChoice],
        *,
        prompt_tokens: int,
        new_tokens: int,
        batch: int | None = None,
        max_weight_error: float | None = None,
        cost: CostModel | None = None,
    ) -> ServingPlan:
        """Chooses each layer's form for a `generate` call: factored, merged or delta-k (`t2kernels.planner`).

        The factored form is what runs without a plan: it alone keeps a row's bits free of the batch around it, and it
        alone is trained through. A plan pays where one expert reads long prompts or answers for long.

        Args:
            experts: as in `generate`.
            prompt_tokens: length of the padded prompts.
            new_tokens: that will be generated for each request.
            batch: rows of the batch, if `experts` is a single choice for all of them; default 1.
            max_weight_error: allows delta-k, with ||W' - what is computed|| <= max_weight_error * ||W|| in every layer
                (Frobenius norms) for every expert of the call.
            cost: a cost model; default `t2.model.serving_plan.cost_model()`, measured once per machine.
        """
        self._check_attached()
        for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch", batch or 1)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        choices = _choices(experts)
        rows = batch or len(choices)
        distinct = {self._key(choice): self.z_of(choice).detach() for choice in choices}
        z = torch.stack(list(distinct.values()))
        passes: dict[int, int] = {rows * prompt_tokens: 1}
        passes[rows] = passes.get(rows, 0) + new_tokens - 1
        phase, cost, layers = Phase(passes, len(distinct)), cost or cost_model(), {}
        largest = max(self._targets.values(), key=lambda t: t.layer.in_features * t.layer.out_features)
        start = time.perf_counter()
        self._dense(largest)
        fetch = (time.perf_counter() - start) / (largest.layer.in_features * largest.layer.out_features)
        for name, target in self._targets.items():
            weight, components, error = target.layer.weight, None, 0.0
            if max_weight_error is not None:
                kept, error = delta_components(weight.s.cpu(), z[:, self.layout.window(name)], max_weight_error)
                components = len(kept)
            layers[name] = plan_layer(
                cost,
                phase,
                (weight.out_features, weight.in_features),
                weight.dtype,
                bf16_products=weight.bf16_products,
                fetch=fetch * weight.in_features * weight.out_features,
                components=components,
                error=error,
            )
        return ServingPlan(Plan(phase, cost, layers, max_weight_error), distinct)

    def _check_plan(self, plan: ServingPlan, choices: list[ExpertChoice]) -> None:
        for choice in choices:
            if isinstance(choice, Tensor) and choice.requires_grad:
                raise ValueError("plan: expected None where a gradient has to reach an expert, got a plan")
            planned = plan.experts.get(self._key(choice))
            if planned is None or not torch.equal(planned, self.z_of(choice).detach()):
                raise ValueError(f"plan: expected one made for this call's experts, got another for {choice!r:.80}")

    def _built(self, plan: ServingPlan) -> dict[int, Merged | Delta]:
        with self._lock:
            if plan.forms is None:
                watch = plan.plan.measured
                built: dict[int, Merged | Delta] = {}
                for name, layer in plan.plan.layers.items():
                    if layer.form == "factored":
                        continue
                    start, target = time.perf_counter(), self._targets[name]
                    build = self._merged_form if layer.form == "merged" else self._delta_form
                    built[target.layer.index] = build(name, target, plan)
                    watch[layer.form] = watch.get(layer.form, 0.0) + time.perf_counter() - start
                plan.forms = built
            return plan.forms

    def _merged_form(self, name: str, target: _Target, plan: ServingPlan) -> Merged:
        (z,) = plan.experts.values()
        return Merged(self._pack_dense(self._merged_weight(name, target, z), target))

    def _delta_form(self, name: str, target: _Target, plan: ServingPlan) -> Delta:
        weight, (u, s, vh) = self._dense(target)
        window, bound = self.layout.window(name), plan.plan.max_weight_error
        assert bound is not None
        z = torch.stack(list(plan.experts.values()))[:, window]
        kept, _ = delta_components(target.layer.weight.s.cpu(), z, bound)
        change = None
        if len(kept):
            stored = target.layer.weight
            change = FactoredWeight.pack(
                u[:, kept], s[kept], vh[kept], dtype=stored.dtype, bf16_products=stored.bf16_products
            )
        base = self._table.sigma[window][kept]
        return Delta(DeltaWeight(self._pack_dense(weight, target), change), base, kept + window.start)

    @staticmethod
    def _pack_dense(weight: Tensor, target: _Target) -> DenseWeight:
        stored = target.layer.weight
        return DenseWeight.pack(weight, dtype=stored.dtype, bf16_products=stored.bf16_products).to(stored.s.device)

    @torch.no_grad()
    def measure_plan(self, plan: ServingPlan) -> None:
        """Runs each layer in its planned form on random activations, three times for every pass, and notes the times.

        They appear in `plan.explain()` beside the predicted ones: whole phases, building included.
        """
        (choice, *_) = plan.experts
        z = plan.experts[choice]
        measured = plan.plan.measured
        measured.clear()
        plan.forms = None
        forms = {index: form.bind(self._table.sigma.unsqueeze(0) * z) for index, form in self._built(plan).items()}
        zeros = torch.zeros(1, dtype=torch.int64, device=self._table.sigma.device)
        route = Route(zeros, (self._table.sigma * z).unsqueeze(0), self.layout, forms)
        for rows, count in plan.plan.phase.passes.items():
            sweeps = [self._seconds_by_form(plan, route, rows) for _ in range(3)]
            for form in plan.plan.forms():
                seconds = statistics.median(sweep[form] for sweep in sweeps)
                measured[form] = measured.get(form, 0.0) + count * seconds

    def _seconds_by_form(self, plan: ServingPlan, route: Route, rows: int) -> dict[str, float]:
        seconds = dict.fromkeys(plan.plan.forms(), 0.0)
        for name, layer in plan.plan.layers.items():
            module = self._targets[name].layer
            x = torch.randn(rows, module.in_features, device=route.slots.device)
            start = time.perf_counter()
            module.alone(x, route)
            seconds[layer.form] += time.perf_counter() - start
        return seconds

    # Running

    def forward(self, *args: Any, experts: ExpertChoice | Sequence[ExpertChoice] = None, **kwargs: Any) -> Any:
        """The model's forward pass; `experts` as in `route`, one entry per row of the batch.

        Without `experts` an enclosing `route` stays in force, and outside one the base model answers.
        """
        if experts is None:
            self._check_attached()
            if torch.compiler.is_dynamo_compiling():
                return self.model(*args, **kwargs)
            self._refresh()
            with self.router.held():
                return self.model(*args, **kwargs)
        self._check_count(experts, args, kwargs)
        self._refresh()
        if not self._verified and len(_choices(experts)) > 1:
            self._verify_call(args, kwargs)
        with self.route(experts):
            return self.model(*args, **kwargs)

    def _verify_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Whether the rows of each layer's input are the requests, of a model that no inputs could be made for."""
        probe = Probe.of_call(self.model, args, kwargs)
        if probe is None:
            return
        self._verified = True  # calls of the probe are calls too
        faults = str(probe.look_rows(self.model, self._layers()))
        if not faults and (trouble := check(self, probe, self._rounding, base=False)) is not None:
            faults = trouble.cause
        if faults:
            self._verified = False
            raise VerificationError(f"experts: expected requests in the rows of every layer. {faults}")

    def set_adaptation(self, strategy: Strategy) -> None:
        """Lets `generate(adapt=...)` find a strategy by its name: "prompt", "classifier", "few-shot"."""
        self._strategies[strategy.name] = strategy

    def adaptation(self, strategy: Strategy | str) -> Strategy:
        """The strategy itself, or the one that `set_adaptation` was given under this name."""
        if not isinstance(strategy, str):
            if not callable(getattr(strategy, "adapt", None)):
                raise TypeError(f"adapt: expected a strategy or the name of one, got {type(strategy).__name__}")
            return strategy
        if strategy not in self._strategies:
            known = ", ".join(self._strategies) or "none: set_adaptation() adds one"
            raise ValueError(f"adapt: expected a strategy or one of {known}, got {strategy!r}")
        return self._strategies[strategy]

    def _adapted(
        self, adapt: Strategy | str, prompts: Sequence[Prompt] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[ExpertChoice]:
        """Pass one."""
        strategy = self.adaptation(adapt)
        if prompts is None:
            ids = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs"), *args) if t is not None), None)
            if ids is None:
                raise ValueError("prompts: expected the requests' texts where generate gets no input_ids, got none")
            prompts = strategy.read(ids, kwargs.get("attention_mask"))
        self.last_adaptation = strategy.adapt(prompts)
        return self.last_adaptation.choices(self)

    def generate(
        self,
        *args: Any,
        experts: ExpertChoice | Sequence[ExpertChoice] = None,
        plan: ServingPlan | None = None,
        adapt: Strategy | str | None = None,
        prompts: Sequence[Prompt] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `generate`, each request with its own expert; `experts` as in `route`, one entry per prompt.

        With `adapt` a first pass chooses the experts (`t2.adaptation`): a strategy, or the name of one that
        `set_adaptation` was given. It reads `prompts`, one for each row, or else the user's words in `input_ids`,
        without the chat template around them. `last_adaptation` tells what it chose.

        Runs in inference mode unless a cache is given or `return_dict_in_generate` asks for more than tokens: what
        streamers and processors of logits see are then inference tensors.

        `plan`: one that `plan()` made for these experts.
        """
        self._check_attached()
        generate = getattr(self.model, "generate", None)
        if generate is None:
            raise TypeError(f"model: expected one with a generate method, got {type(self.model).__name__}")
        if adapt is not None:
            if experts is not None or plan is not None:
                raise ValueError("adapt: expected neither experts nor a plan beside it, which pass one cannot know of")
            experts = self._adapted(adapt, prompts, args, kwargs)
        elif prompts is not None:
            raise ValueError("prompts: expected a strategy to read them, got none in adapt")
        self._refresh()
        with ExitStack() as held:
            if experts is not None or plan is not None:
                self._check_count(experts, args, kwargs)
                held.enter_context(self.route(experts, plan))
            else:
                held.enter_context(self.router.held())
            if not self._returns_more_than_tokens(kwargs):
                kwargs = self._with_growing_cache(kwargs)
                held.enter_context(torch.inference_mode())
            answer = generate(*args, **kwargs)
        return answer.clone() if isinstance(answer, Tensor) and answer.is_inference() else answer

    def _generation_option(self, kwargs: Mapping[str, Any], name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        given = getattr(kwargs.get("generation_config"), name, None)
        return getattr(getattr(self.model, "generation_config", None), name, None) if given is None else given

    def _returns_more_than_tokens(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether more than the tokens outlives `generate`: tensors made in inference mode would be of less use."""
        return kwargs.get("past_key_values") is not None or self._generation_option(kwargs, "return_dict_in_generate")

    def _with_growing_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leaves the cache to `generate` where its options say what it is to be."""
        if (
            self._generation_option(kwargs, "use_cache") is False
            or self._generation_option(kwargs, "cache_implementation") not in (None, "dynamic")
            or self._generation_option(kwargs, "prompt_lookup_num_tokens") is not None
            or kwargs.get("assistant_model") is not None
        ):
            return kwargs
        cache = growing_cache(self.model)
        if cache is None:
            return kwargs
        named = self._generation_option(kwargs, "cache_implementation") is not None
        return kwargs | {"past_key_values": cache} | ({"cache_implementation": None} if named else {})

    @staticmethod
    def _check_count(experts: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not isinstance(experts, Sequence) or isinstance(experts, str):
            return
        named = [kwargs[k] for k in ("input_ids", "inputs", "inputs_embeds") if k in kwargs]
        batch = next((t for t in (*named, *args) if isinstance(t, Tensor)), None)
        if batch is not None and batch.shape[0] != len(experts):
            raise ValueError(
                f"experts: expected one entry for each of the {batch.shape[0]} requests of the batch, "
                f"got {len(experts)}"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    # Back to plain models

    def merge(self, expert: ExpertChoice) -> nn.Module:
        """A plain copy of the model with this expert built in: W + U diag(sigma (z - 1)) Vh in every target layer.

        The copy has nothing of t2 in it; `save_pretrained` works. At z = 1 it is the base, bit for bit.
        """
        self._check_attached()
        z = self.z_of(expert).detach()
        memo: dict[int, Any] = {
            id(target.layer): self._merged_layer(name, target, z) for name, target in self._targets.items()
        }
        merged = copy.deepcopy(self.model, memo)
        for module in merged.modules():
            unpack(module)
        give_back(merged)
        return merged

    def _merged_layer(self, name: str, target: _Target, z: Tensor) -> nn.Module:
        """A plain copy of the layer that a decomposed one stands for, with the expert built in."""
        module: Linear = target.layer.__dict__["module"]
        plain, empty = copy.deepcopy(module), module.weight
        weight = as_stored(module, self._merged_weight(name, target, z)).to(empty.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=empty.requires_grad)
        return plain.train(target.layer.training)

    def _merged_weight(self, name: str, target: _Target, z: Tensor) -> Tensor:
        weight, (u, s, vh) = self._dense(target)
        scale = s * (z[self.layout.window(name)].to(weight.device) - 1.0)
        if not scale.any():  # adding zeros would turn -0.0 into 0.0
            return weight.clone()
        return (weight.float() + (u * scale) @ vh).to(weight.dtype)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Always a TypeError: a model on disk is a plain one, an expert a file of its own."""
        raise TypeError(
            "save_pretrained: expected a plain model, got one with decomposed layers; save `merge(expert)` for a model "
            "with an expert built in, `detach()` for the base, or the expert itself with `Expert.save`"
        )

    def detach(self) -> nn.Module:
        """Gives the base model back, bit for bit, and leaves this wrapper unusable."""
        self._check_attached()
        self._restore()
        return self.model

    def _dense(self, target: _Target) -> tuple[Tensor, Factors]:
        """The base weight [out, in] and its factors, on the layer's device."""
        if self._cache is None:
            assert target.weight is not None
            return target.weight, Factors(*target.layer.weight.factors())
        device = target.layer.weight.s.device
        source = self._sources.get(target.key)
        factors = self._cache.load_or_redo(target.key, source)
        return self._cache.load_weight_or(target.key, source).to(device), Factors(*(f.to(device) for f in factors))

    def _restore(self) -> None:
        """All dense weights are read before any layer is put back, so a failure leaves the wrapped model whole."""
        weights = {}
        for name, target in self._targets.items():
            weight = (
                target.weight
                if self._cache is None
                else self._cache.load_weight_or(target.key, self._sources.get(target.key))
            )
            assert weight is not None
            weights[name] = weight
        for name, target in self._targets.items():
            self.model.set_submodule(name, target.layer.restored(weights[name]))
        for layer in self._packed.values():
            unpack(layer)
        give_back(self.model)
        self._targets, self._packed = {}, {}

    def _check_attached(self) -> None:
        if not self._targets:
            raise RuntimeError("this SVFModel has been detached from its model; wrap the model again")

    def extra_repr(self) -> str:
        text = f"matrices={len(self.layout.names)}, R={self.layout.R}, experts={len(self.bank)}"
        return f"{text}, {self.coverage}" if self.coverage.share < LARGE_SHARE else text


def _choices(experts: ExpertChoice | Sequence[ExpertChoice]) -> list[ExpertChoice]:
    single = experts is None or isinstance(experts, str | Mapping | Expert | Tensor)
    return [experts] if single else list(experts)  # type: ignore[list-item,arg-type]


def _with_signature(kind: type[SVFModel], model: type[nn.Module]) -> type[SVFModel]:
    """A class of wrapped models whose `forward` shows the arguments of the model's, as trainers read them there."""

    @functools.wraps(kind.forward)
    def of_model(self: SVFModel, *args: Any, experts: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, *args, experts=experts, **kwargs)

    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.name != "experts"]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    experts = inspect.Parameter("experts", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*(p for p in parameters if p not in rest), experts, *rest]
    of_model.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type(f"SVF{model.__name__}", (kind,), {"forward": of_model, "__module__": kind.__module__})


def _check_source(source: FactorSource, targets: Mapping[str, Linear]) -> None:
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
