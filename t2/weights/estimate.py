"""Estimates before any weight is read: disk, memory, time, and the GPUs that a model fits.

Everything follows from the config: the skeleton on the meta device has the shapes, `t2/weights/memory_model.py` the
formulas. `tests/t2/weights/test_estimate.py` compares them with what packing, saving, and a step of the trainer really
hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from t2.weights.fused_experts import unfuse
from t2.weights.memory_model import (
    ACTIVATIONS_OF,
    Architecture,
    Rates,
    decompose_bytes,
    delta_bytes,
    dense_bytes,
    disk_bytes,
    factor_bytes,
)
from t2.weights.step_sizes import StepSizes
from t2.weights.streaming import checkpoint_folder, skeleton
from t2.weights.targets import Linear, linear_layers, other_linears, plain_targets, weight_matrix
from t2kernels.packing import INT4

STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
CPU_DELTA_STORAGE = (torch.uint8, INT4)
GPUS = (24, 48, 80, 141)  # GB
RESERVED = 1.0e9  # of a GPU: the CUDA context, kernels, what the allocator cannot hand out
SLOTS = 8  # that a slot table begins with
LOSS_ROWS = 64  # whose temporaries `policy_loss` holds at once
SAMPLER = 36  # bytes for each row and entry of the vocabulary while a token is drawn


@dataclass(frozen=True)
class Shape:
    """Decomposed matrices of one shape."""

    out_features: int
    in_features: int
    count: int
    example: str
    active: float = 1.0  # share of these matrices that a token meets: fewer than all are those of a mixture's experts

    @property
    def rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class ModelEstimate:
    """The estimate for one model, made by `estimate_model`. Sizes are bytes."""

    name: str
    dtype: torch.dtype  # of the model
    architecture: Architecture
    shapes: tuple[Shape, ...]
    dense_parameters: int  # of all weights that are no targets
    others: tuple[tuple[int, int], ...]  # [out, in] of linear layers that are no targets: they are packed beside
    other_products: int  # out * in of those but the output embedding
    rates: Rates | None = None
    support: int | None = None  # components of each matrix in the delta form; None is the factored form

    @property
    def matrices(self) -> int:
        return sum(shape.count for shape in self.shapes)

    @property
    def expert(self) -> int:
        """R: numbers of an expert."""
        return sum(shape.count * shape.rank for shape in self.shapes)

    @property
    def free(self) -> int:
        """Numbers of an expert that may differ from 1: K of the delta form, or all R."""
        return sum(shape.count * self._components(shape) for shape in self.shapes)

    def _components(self, shape: Shape) -> int:
        return shape.rank if self.support is None else min(self.support, shape.rank)

    @property
    def multiply_adds(self) -> float:
        """Ratio to the dense model's: sum r (out + in) / sum out in, in the delta form 1 + sum k (out + in) / sum
        out in, with layers that are no targets in both; attention and the output embedding left out."""
        met = [(s, s.count * s.active) for s in self.shapes]
        products = sum(count * self._components(s) * (s.out_features + s.in_features) for s, count in met)
        dense = sum(count * s.out_features * s.in_features for s, count in met) + self.other_products
        return (products + (self.other_products if self.support is None else dense)) / dense

    @property
    def disk(self) -> int:
        """The factor cache."""
        return sum(s.count * disk_bytes(s.out_features, s.in_features, self.dtype) for s in self.shapes)

    @property
    def decompose_seconds(self) -> float | None:
        if self.rates is None:
            return None
        return sum(s.count * self.rates.seconds(s.out_features, s.in_features) for s in self.shapes)

    @property
    def decompose_peak(self) -> int:
        """Memory while the cache is filled: one matrix at a time."""
        return max(decompose_bytes(s.out_features, s.in_features, self.dtype) for s in self.shapes)

    def factors(self, storage: torch.dtype) -> int:
        """Bytes of the decomposed layers: of the factors, or of W and the support's components."""
        return sum(
            s.count
            * (
                factor_bytes(s.out_features, s.in_features, storage)
                if self.support is None
                else delta_bytes(s.out_features, s.in_features, self._components(s), storage)
            )
            for s in self.shapes
        )

    def rest(self, storage: torch.dtype) -> int:
        """Weights that are no targets, and the packed copies of linear layers among them."""
        packed = {torch.int8: torch.float16, INT4: torch.uint8}.get(storage, storage)
        return self.dense_parameters * self.dtype.itemsize + sum(dense_bytes(*shape, packed) for shape in self.others)

    @property
    def slots(self) -> int:
        """The slot table as it begins, and the singular values; in the delta form those of the support and zeros."""
        beside = 0 if self.support is None else 4 * 4 * self.free  # positions of 8 bytes
        return 4 * self.free * SLOTS + 4 * self.expert + beside

    def serving(self, storage: torch.dtype) -> int:
        """A model that is ready to serve, without requests."""
        return self.factors(storage) + self.rest(storage) + self.slots

    @property
    def cache(self) -> int:
        """Keys and values of one token."""
        return self.architecture.cache_bytes(self.dtype)

    # Training

    @property
    def learnt(self) -> int:
        """z, its gradient and Adam's two moments."""
        return 4 * 4 * self.free

    def activations(self, rows: int, new: int, keys: int, *, checkpointing: bool = False) -> float:
        """Bytes that a forward pass keeps for its backward pass, without logits; of layers run again, their inputs.

        Raises:
            ValueError: the formula does not describe this kind of model.
        """
        a, e, n = self.architecture, self.dtype.itemsize, rows * new
        outside = 2 * n * a.head_dim * e + 4 * self.free  # rotary embedding; sigma * z
        if checkpointing:
            return a.layers * n * a.hidden * e + n * (4 * a.hidden + 4) + outside
        return a.layers * self._layer(rows, new, keys) + outside

    def _layer(self, rows: int, new: int, keys: int) -> float:
        a = self.architecture
        if a.model_type not in ACTIVATIONS_OF:
            raise ValueError(f"model: expected one of {', '.join(ACTIVATIONS_OF)} for activations, got {a.model_type}")
        return a.layer_activations(self.free / a.layers, rows, new, keys, self.dtype)

    def update(self, work: StepSizes, prompts: int, answers: int, *, checkpointing: bool = False) -> float:
        """Most that a micro-batch of the update holds (`Trainer._update`).

        When the loss is taken, that is what the forward pass kept and what the loss needs; later, of the backward pass,
        what a layer needs for a moment, and with checkpointing its activations.
        """
        width, length = work.prompt_tokens, work.new_tokens
        loss = self._loss(answers * length)
        if checkpointing:  # every answer with a prompt of its own
            rows, new = answers, width + length
            kept = self.activations(rows, new, new, checkpointing=True)
            moment = self._layer(rows, new, new) + self.architecture.transient(rows * new, self.dtype)
            return kept + max(loss, moment)
        kept = self.activations(prompts, width, width) + self.activations(answers, length, width + length)
        kept += answers * (width + length) * self.cache
        return kept + max(loss, self.architecture.transient(answers * length, self.dtype))

    def _loss(self, tokens: int) -> float:
        """Bytes that `policy_loss` holds: hidden states of base and policy and their gradient, and of some rows the
        logits of both and float32 temporaries."""
        e = self.dtype.itemsize
        temporaries = 4 * (4 if e == 4 else 5)
        chunk = min(tokens, LOSS_ROWS) * self.architecture.vocabulary
        return 3 * tokens * self.architecture.hidden * e + chunk * (2 * e + temporaries)

    def rollout(self, work: StepSizes) -> float:
        """Most that drawing a step's answers holds: the cache, one token's logits, the reading of the prompts."""
        a = self.architecture
        cache = work.rows * (work.prompt_tokens + work.new_tokens) * self.cache
        drawing = work.rows * a.vocabulary * SAMPLER
        reading = a.transient(work.prompts_per_step * work.prompt_tokens, self.dtype)
        return cache + max(drawing, reading)

    def training(
        self, storage: torch.dtype, work: StepSizes, prompts: int, answers: int, *, checkpointing: bool = False
    ) -> float:
        """Peak of a training step."""
        step = max(self.rollout(work), self.update(work, prompts, answers, checkpointing=checkpointing))
        return self.serving(storage) + self.learnt + step

    def largest_budget(self, room: float, storage: torch.dtype, work: StepSizes, *, checkpointing: bool) -> int | None:
        """The largest `--token-budget` that changes anything and fits; None if not even one answer does."""
        fitting = [
            work.tokens(*batch, checkpointing=checkpointing)
            for batch in work.micro_batches()
            if self.training(storage, work, *batch, checkpointing=checkpointing) <= room
        ]
        return max(fitting, default=None)

    def to_dict(self, work: StepSizes | None = None) -> dict[str, Any]:
        """Everything the tables show, as JSON holds it; sizes in bytes."""
        work = work or StepSizes()
        trains = self.architecture.model_type in ACTIVATIONS_OF
        return {
            "model": self.name,
            "model_dtype": _name(self.dtype),
            "architecture": asdict(self.architecture),
            "shapes": [asdict(shape) | {"rank": shape.rank} for shape in self.shapes],
            "matrices": self.matrices,
            "parameters_per_expert": self.free,
            "support": self.support,
            "multiply_adds": self.multiply_adds,
            "disk": self.disk,
            "decompose": {
                "seconds": self.decompose_seconds,
                "rates": None if self.rates is None else asdict(self.rates),
                "peak": self.decompose_peak,
            },
            "cache_per_token": self.cache,
            "slot": 4 * self.free,
            "work": asdict(work),
            "storage": {
                _name(storage): {
                    "factors": self.factors(storage),
                    "other_weights": self.rest(storage),
                    "serving": self.serving(storage),
                    "gpus": [self._on_gpu(gpu, storage, work, trains) for gpu in GPUS if storage in STORAGE],
                }
                for storage in (STORAGE if self.support is None else STORAGE + CPU_DELTA_STORAGE)
            },
        }

    def _on_gpu(self, gpu: int, storage: torch.dtype, work: StepSizes, trains: bool) -> dict[str, Any]:
        room = usable(gpu)
        left = room - self.serving(storage)
        found: dict[str, Any] = {
            "gb": gpu,
            "serves": left > 0,
            "cached_tokens": max(0, int(left // self.cache)),
            "gpus_to_serve": gpus_needed(self.serving(storage), gpu),
        }
        if trains:
            for name, checkpointing in (("token_budget", False), ("token_budget_checkpointing", True)):
                found[name] = self.largest_budget(room, storage, work, checkpointing=checkpointing)
            smallest = self.training(storage, work, *work.micro_batches()[0], checkpointing=True)
            found["smallest_training"] = smallest
            found["gpus_to_train"] = gpus_needed(smallest, gpu)
        return found


def usable(gpu: int) -> float:
    """Bytes of a GPU of so many GB that a process can fill."""
    return gpu * 1e9 - RESERVED


def gpus_needed(size: float, gpu: int) -> int:
    """GPUs over which so many bytes have to be divided."""
    return -int(-size // usable(gpu))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def estimate_model(
    name_or_path: str | Path,
    target_modules: str | Sequence[str] = "all-linear",
    *,
    dtype: torch.dtype = torch.bfloat16,
    rates: Rates | None = None,
    support: int | None = None,
) -> ModelEstimate:
    """The plan for a model, from its config alone.

    Args:
        name_or_path: a `config.json`, a model folder, a Hub id or an alias.
        target_modules: as in `SVFConfig`.
        dtype: of the model.
        rates: for the time of the decomposition; None leaves that out.
        support: components of each matrix, for the delta form; None is the factored form.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: nothing matches `target_modules`, or a support below 1.
    """
    if support is not None and support < 1:
        raise ValueError(f"support: expected None or an integer >= 1, got {support}")
    path = Path(name_or_path).expanduser()
    if path.suffix == ".json" and not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    is_local = path.is_file() and path.suffix == ".json"
    source = path if is_local else checkpoint_folder(name_or_path, weights=False)
    config = AutoConfig.from_pretrained(str(source))
    model = skeleton(config, dtype)
    experts = unfuse(model, target_modules, on_meta=True)
    share = _share_of_experts(config) if experts else 1.0
    targets = plain_targets(model, target_modules, on_meta=True)
    groups: dict[tuple[int, int, float], list[str]] = {}
    for name, layer in targets.items():
        active = share if any(name.startswith(f"{each}.") for each in experts) else 1.0
        groups.setdefault((*_shape(layer), active), []).append(name)
    chosen = {id(layer.weight) for layer in targets.values()}
    rest = {id(p): prod(p.shape) for p in model.parameters() if id(p) not in chosen}
    others = {n: _shape(layer) for n, layer in other_linears(model, on_meta=True).items() if n not in targets}
    return ModelEstimate(
        name=str(name_or_path),
        dtype=dtype,
        architecture=Architecture.of(config, model),
        shapes=tuple(
            Shape(rows, columns, len(names), names[0], active) for (rows, columns, active), names in groups.items()
        ),
        dense_parameters=sum(rest.values()),
        others=tuple(others.values()),
        other_products=sum(prod(_shape(layer)) for n, layer in linear_layers(model).items() if n not in targets),
        rates=rates,
        support=support,
    )


def _share_of_experts(config: Any) -> float:
    """The share of a block's experts that a token meets, by the names that families have for both numbers."""

    def number(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)

    met = number("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk")
    count = number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return met / count if met and count else 1.0


def _shape(layer: Linear) -> tuple[int, int]:
    rows, columns = weight_matrix(layer).shape
    return rows, columns
