"""The fastest form of a layer for a phase of work: factored, merged or delta-k.

| form     | a row's product                                              | once per phase          |
|----------|--------------------------------------------------------------|-------------------------|
| factored | U diag(s z) Vh x                                             |                         |
| merged   | W' x, W' = W + U diag(s (z - 1)) Vh; one expert only         | build and pack W'       |
| delta-k  | W x + U_k diag(s_k (z_k - 1)) Vh_k x, k leading components   | pack W, U_k and Vh_k    |

A layer that is kept in the delta form, W beside the components of a support, stays in it or is merged.

The cost model is measured, once per machine: a product of [rows, k] with an [n, k] matrix out of cold memory takes
n * k times what an entry costs at so many rows, and what each activation costs that goes in or out; a call a constant.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from t2kernels.backends import build_info, extension
from t2kernels.packing import BESIDE, DENSE_STORAGE_DTYPES, INT4, PANEL
from t2kernels.weights import DenseWeight

FORMS = ("factored", "merged", "delta")
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
SIDE, COLD_BYTES = 768, 96 << 20  # what is measured: square matrices, so many that caches cannot hold them


BF16_PRODUCTS = "bfloat16 products"


def storage_kind(dtype: torch.dtype, bf16_products: bool = False) -> str:
    """The key in `CostModel.rates` of a storage format and the arithmetic that it meets."""
    if dtype == torch.bfloat16 and bf16_products and extension is not None and extension.bf16_products():
        return BF16_PRODUCTS
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class CostModel:
    """Seconds that products take on one machine, with one instruction set and number of threads.

    entry: for each entry of a matrix, by storage format and number of rows (ROWS). row: for each activation of a row,
    in and out. call: of a call with nothing to do. build: for each multiply-add of building W'. pack: for each entry
    that is packed.
    """

    machine: str
    entry: Mapping[str, tuple[float, ...]]
    row: float
    call: float
    build: float
    pack: float

    @staticmethod
    def machine_key() -> str:
        """The instruction set, threads, torch version and storage formats that a measurement holds for."""
        kernels, formats = build_info().get("chosen", "reference"), len(DENSE_STORAGE_DTYPES)
        return f"{kernels}, {torch.get_num_threads()} threads, torch {torch.__version__}, {formats} formats"

    @classmethod
    def measure(cls, rounds: int = 3) -> CostModel:
        """Takes a few seconds; nothing else should run meanwhile."""
        matrix, entry = torch.randn(SIDE, SIDE) / SIDE**0.5, {}
        with torch.inference_mode():
            for dtype, bf16_products in (*((d, False) for d in DENSE_STORAGE_DTYPES), (torch.bfloat16, True)):
                weights = [DenseWeight.pack(matrix, dtype=dtype, bf16_products=bf16_products)]
                count = -(-COLD_BYTES // weights[0].nbytes)
                weights += [copy.deepcopy(weights[0]) for _ in range(count - 1)]

                def all_of_them(x: torch.Tensor, weights: Sequence[DenseWeight] = weights) -> None:
                    for weight in weights:
                        weight.linear_unchecked(x)

                times = [_best(functools.partial(all_of_them, torch.randn(rows, SIDE)), rounds) for rows in ROWS]
                entry[storage_kind(dtype, bf16_products)] = tuple(seconds / count / SIDE**2 for seconds in times)
            tiny, thin = DenseWeight.pack(torch.ones(1, 1)), DenseWeight.pack(matrix[:PANEL])
            many = torch.randn(ROWS[-1], SIDE)
            return cls(
                machine=cls.machine_key(),
                entry=entry,
                row=_best(functools.partial(thin.linear_unchecked, many), 10) / (ROWS[-1] * (SIDE + PANEL)),
                call=_best(functools.partial(tiny.linear_unchecked, torch.ones(1, 1)), 50),
                build=_best(lambda: matrix @ matrix, 5) / SIDE**3,
                pack=_best(lambda: DenseWeight.pack(matrix, dtype=torch.float16), 5) / SIDE**2,
            )

    def product(self, rows: int, n: int, k: int, dtype: torch.dtype, bf16_products: bool = False) -> float:
        """Seconds of [rows, k] times a packed [n, k] matrix that is not in cache."""
        if rows == 0:
            return 0.0
        entry = self.entry[storage_kind(dtype, bf16_products)]
        i = min(bisect.bisect_left(ROWS, rows), len(ROWS) - 1)
        seconds = entry[i] * rows / ROWS[i]
        if i > 0 and rows < ROWS[i]:  # between two measured numbers of rows
            part = (rows - ROWS[i - 1]) / (ROWS[i] - ROWS[i - 1])
            seconds = entry[i - 1] + part * (entry[i] - entry[i - 1])
        return n * k * seconds + rows * (n + k) * self.row

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> CostModel:
        """Raises ValueError where `values` is not what `to_dict` gave."""
        try:
            kinds = {storage_kind(dtype) for dtype in DENSE_STORAGE_DTYPES} | {storage_kind(torch.bfloat16, True)}
            entry = {kind: tuple(float(seconds) for seconds in values["entry"][kind]) for kind in kinds}
            numbers = {name: float(values[name]) for name in ("row", "call", "build", "pack")}
            model = cls(machine=str(values["machine"]), entry=entry, **numbers)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"values: expected a cost model as to_dict gives it, got {values!r:.200}: {error}"
            ) from error
        seconds = (*numbers.values(), *itertools.chain(*entry.values()))
        if not all(0 <= each < 10 for each in seconds) or any(len(column) != len(ROWS) for column in entry.values()):
            raise ValueError(f"values: expected {len(ROWS)} times from 0 to 10 s for each format, got {values!r:.200}")
        return model


def _best(run: Callable[[], Any], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True)
class Phase:
    """A stretch of work with the same experts: forward passes, as {rows of a pass: number of such passes}.

    A `generate` call is {batch * prompt length: 1, batch: new tokens - 1}.
    """

    passes: Mapping[int, int]
    experts: int = 1  # distinct ones in the batch, the base included

    def __post_init__(self) -> None:
        if not self.passes or any(rows < 0 or count < 0 for rows, count in self.passes.items()):
            raise ValueError(f"passes: expected rows >= 0 and counts >= 0, got {dict(self.passes)}")
        if self.experts < 1:
            raise ValueError(f"experts: expected at least 1, got {self.experts}")


@dataclass(frozen=True)
class LayerPlan:
    """The choice for one layer: seconds of the whole phase by form, what is built once included."""

    form: str
    predicted: Mapping[str, float]
    components: int = 0  # k of delta-k
    error: float = 0.0  # delta-k: bound of ||W' - what is computed||_F / ||W||_F over the phase's experts


@dataclass
class Plan:
    """The choice for every layer, by name, and why: `explain()`."""

    phase: Phase
    cost: CostModel
    layers: dict[str, LayerPlan]
    max_weight_error: float | None = None
    measured: dict[str, float] = field(default_factory=dict)  # seconds by form, of the layers that use it

    def forms(self) -> dict[str, list[str]]:
        """Names of the layers by the form chosen for them."""
        return {
            form: found
            for form in FORMS
            if (found := [name for name, layer in self.layers.items() if layer.form == form])
        }

    def predicted(self, form: str | None = None) -> float:
        """Seconds of the phase's linear layers: as planned, or if all had this form (inf where one can't)."""
        return sum(layer.predicted.get(form or layer.form, math.inf) for layer in self.layers.values())

    def explain(self) -> str:
        """The chosen form, the predicted time of each form, and the measured times."""
        passes = ", ".join(f"{count} of {rows} rows" for rows, count in self.phase.passes.items())
        lines = [
            f"Forward passes: {passes}; distinct experts: {self.phase.experts}. Machine: {self.cost.machine}.",
            "If every layer had one form, seconds of the linear layers (predicted):",
        ]
        for form in FORMS:
            seconds = self.predicted(form)
            reason = {
                "factored": "the model has the delta form",
                "merged": "needs one expert for all requests, and more than 4 bits",
                "delta": "no bound on the weight error was given",
            }
            lines.append(f"  {form:9}{seconds:10.4f}" if seconds < math.inf else f"  {form:9}         - {reason[form]}")
        lines.append(f"Chosen, layer by layer: {self.predicted():.4f} s.")
        for form, names in self.forms().items():
            seconds = sum(self.layers[name].predicted[form] for name in names)
            measured = f", measured {self.measured[form]:.4f} s" if form in self.measured else ""
            line = f"  {form:9}{len(names):4} layers: predicted {seconds:.4f} s{measured}"
            if form == "delta":
                ks = [self.layers[name].components for name in names]
                worst = max(self.layers[name].error for name in names)
                line += f"; {min(ks)} to {max(ks)} components, weight error at most {worst:.2e}"
            lines.append(line)
        return "\n".join(lines)


def plan_layer(
    cost: CostModel,
    phase: Phase,
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    bf16_products: bool = False,
    fetch: float = 0.0,
    components: int | None = None,
    error: float = 0.0,
    support: int | None = None,
) -> LayerPlan:
    """The fastest form of one layer.

    Args:
        cost: of this machine.
        phase: what lies ahead.
        size: (out, in) of W.
        dtype, bf16_products: storage of factors and of merged weights, and their arithmetic. Beside W in int4 factors
            are uint8, and nothing is merged: rounding to 4 bits would drown what an expert changes.
        fetch: seconds of getting W and its factors from where they are kept, for the forms that are built from them.
        components: k that delta-k needs, or None where it is not allowed.
        error: the weight error that this k leaves.
        support: components of a layer that is kept in the delta form: nothing has to be packed for it, and all
            factors are not there.
    """
    out, inputs = size
    rank = min(size)

    def passes(seconds: Callable[[int], float]) -> float:
        return sum(count * seconds(rows) for rows, count in phase.passes.items())

    def product(rows: int, n: int, k: int, stored: torch.dtype) -> float:
        return cost.product(rows, n, k, stored, bf16_products)

    def dense(rows: int) -> float:
        return cost.call + product(rows, out, inputs, dtype)

    def factors(rows: int, k: int) -> float:
        stored = dtype if support is None else BESIDE.get(dtype, dtype)
        return cost.call + product(rows, k, inputs, stored) + product(rows, out, k, stored) if k else 0.0

    predicted: dict[str, float] = {}
    if support is None:
        predicted["factored"] = passes(lambda rows: factors(rows, rank))
    else:
        predicted["delta"] = passes(lambda rows: dense(rows) + factors(rows, support))
    if phase.experts == 1 and dtype != INT4:
        build = out * inputs * (rank * cost.build + cost.pack)
        predicted["merged"] = fetch + build + passes(dense)
    if components is not None and support is None:
        packing = (out * inputs + components * (out + inputs)) * cost.pack
        predicted["delta"] = fetch + packing + passes(lambda rows: dense(rows) + factors(rows, components))
    form = min(predicted, key=lambda name: predicted[name])
    k, bound = (components or 0, error) if form == "delta" else (0, 0.0)
    if form == "delta" and support is not None:
        k, bound = support, 0.0
    return LayerPlan(form, predicted, k, bound)


def delta_components(
    s: torch.Tensor, z: torch.Tensor, max_weight_error: float, multiple: int = 16
) -> tuple[torch.Tensor, float]:
    """The components that delta-k keeps, and the error bound of leaving out the others.

    W' - (W + U_k diag(s_k (z_k - 1)) Vh_k) has Frobenius norm sqrt(sum over the others of (s (z - 1))^2), since the
    factors are orthonormal; relative to ||W||_F = ||s||. Kept are those with the largest |s (z - 1)| over the experts.

    Args:
        s: [r], z: [E, r] of the experts of the phase.
        max_weight_error: bound of the relative error, for every expert.
        multiple: k is rounded up to a multiple of this.

    Returns:
        (indices [k] in ascending order, the error that is left: at most max_weight_error).
    """
    if not max_weight_error >= 0:
        raise ValueError(f"max_weight_error: expected a number >= 0, got {max_weight_error}")
    change = (s * (z - 1)).double().square()
    order = change.amax(0).argsort(descending=True)
    norm = s.double().square().sum().clamp(min=1e-300)
    left = change[:, order].flip(1).cumsum(1).flip(1)  # [E, r]: left[:, k] is what dropping order[k:] loses
    worst = torch.cat([left.amax(0), left.new_zeros(1)]) / norm
    k = int((worst > max_weight_error**2).sum())
    k = min(-(-k // multiple) * multiple, len(s))
    return order[:k].sort().values, float(worst[k].sqrt())
