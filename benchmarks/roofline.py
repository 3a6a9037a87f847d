"""A roofline of serving on GPUs: what bytes, operations and launches allow, before any GPU has run it.

    python benchmarks/roofline.py

Predictions from data sheets, not measurements. Writes benchmarks/results/roofline.json, docs/roofline.md and its plots
(benchmarks/roofline_page.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.results_cpu import BYTES

GAP = 1.5e-6  # seconds from the end of one kernel to the start of the next in a CUDA graph
RAMP = 1.0e-6  # seconds a kernel takes until it reads at full rate, and its tail
BARRIER = 1.0e-6  # one barrier over the grid inside a kernel; the next weights are prefetched before it
EAGER_CALL = 6e-6  # seconds of the host per launch; it runs ahead of the device
BANDWIDTH_SHARE = 0.85  # of the data sheet's bandwidth while a kernel reads weights
CUBLAS_SHARE = 0.75  # of the data sheet's rate that cuBLAS reaches
OURS_SHARE = 0.90  # of cuBLAS that our products reach
SCALE_BYTES = 4  # a row of the slot table is float32
ONE_LAUNCH_ROWS = 16  # the CUDA decode kernel takes up to this many rows
LORA_RANK = 16
DELTA_SHARE = 1 / 8  # k / r
CONTEXT = 1024  # tokens kept per request while decoding
PROMPT = 512  # tokens of a request in prefill
REST_LAUNCHES = 5  # a layer: norm, rotation with cache write, attention, norm, activation
HEAD_LAUNCHES = 3  # embedding, norm, head
PEFT_LAUNCHES = 10  # a matrix and adapter, peft 0.21: 3 index copies; gather x, A, B, scale, gather y, add, put back
BATCHES = (1, 4, 8, 16, 32, 64)
EXPERTS = (1, 2, 4, 8, 16, 32, 64, 256)
TOKENS = (512, 2048, 16384)
BARS = {  # a GPU run is held to them
    "share of bandwidth, B <= 32": BANDWIDTH_SHARE,
    "share of the two cuBLAS products, prefill": OURS_SHARE,
    "64 distinct experts / 1": 1.02,
    "factored / dense over 1 + min/max": 1.05,
    "PEFT mixed / ours, 32 distinct": 10,
}
ASSUMPTIONS = [name for name, value in globals().items() if name.isupper() and isinstance(value, int | float)]


@dataclass(frozen=True)
class Chip:
    name: str
    bandwidth: float  # bytes/s
    bf16: float  # operations/s, dense; a multiply-add is two
    fp8: float | None
    int8: float
    l2: float  # bytes
    memory: float  # bytes


# Data sheets of NVIDIA A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (an eighth); H100's and H200's rates are half of
# what they state with sparsity. L2: GA100 and GH100 white papers, and for B200 what CUDA reports.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 2.039e12, 312e12, None, 624e12, l2=40e6, memory=80e9),
        Chip("H100", 3.35e12, 989.5e12, 1979e12, 1979e12, l2=50e6, memory=80e9),
        Chip("H200", 4.8e12, 989.5e12, 1979e12, 1979e12, l2=50e6, memory=141e9),
        Chip("B200", 8e12, 2250e12, 4500e12, 4500e12, l2=126e6, memory=180e9),
    )
}


@dataclass(frozen=True)
class Group:
    """Linears that share their input."""

    name: str
    inputs: int
    outs: tuple[int, ...]

    @property
    def out(self) -> int:
        return sum(self.outs)

    @property
    def ranks(self) -> list[int]:
        return [min(self.inputs, out) for out in self.outs]

    @property
    def entries(self) -> int:
        return self.inputs * self.out

    def factors(self, share: float = 1) -> tuple[float, float]:
        """Entries of all Vh, and of all U, with this share of the components."""
        return (
            share * self.inputs * sum(self.ranks),
            share * sum(out * rank for out, rank in zip(self.outs, self.ranks, strict=True)),
        )

    def lora(self) -> tuple[int, int]:
        """Entries of all A, and of all B."""
        return LORA_RANK * self.inputs * len(self.outs), LORA_RANK * self.out


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def groups(self) -> tuple[Group, ...]:
        return (
            Group("q k v", self.hidden, (self.hidden, self.kv, self.kv)),
            Group("o", self.hidden, (self.hidden,)),
            Group("gate up", self.hidden, (self.intermediate, self.intermediate)),
            Group("down", self.intermediate, (self.hidden,)),
        )

    @property
    def entries(self) -> int:
        return self.layers * sum(group.entries for group in self.groups)

    @property
    def factored_entries(self) -> int:
        return int(self.layers * sum(sum(group.factors()) for group in self.groups))

    @property
    def rank(self) -> int:
        return self.layers * sum(sum(group.ranks) for group in self.groups)

    @property
    def lora(self) -> int:
        return self.layers * sum(sum(group.lora()) for group in self.groups)

    @property
    def embeddings(self) -> int:
        return self.vocab * self.hidden * (1 if self.tied else 2)


MODELS = {
    model.name: model
    for model in (
        Model("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, tied=True),
        Model("Mistral-7B", 4096, 14336, 32, 32, 8, 32768),  # v0.3
        Model("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
        Model("Llama-3-70B", 8192, 28672, 80, 64, 8, 128256),
    )
}


@dataclass(frozen=True)
class Form:
    name: str
    kind: str
    entry_bytes: float = 2
    products: str = "bf16"


FORMS = {
    form.name: form
    for form in (
        Form("dense bf16", "dense"),
        Form("dense int8", "dense", 1),
        Form("dense int8, int8 products", "dense", 1, "int8"),
        Form("merged bf16", "merged"),
        Form("factored bf16", "factored"),
        Form("factored int8", "factored", BYTES["int8"]),
        Form("factored int8, int8 products", "factored", BYTES["int8"], "int8"),
        Form("delta r/8 bf16", "delta"),
        Form("LoRA r=16 bf16", "lora"),
        Form("LoRA r=16, int8 base", "lora", 1),
        Form("PEFT LoRA r=16 bf16", "peft"),
    )
}
DECODED = [name for name, form in FORMS.items() if form.products == "bf16"]  # decoding waits for bytes


@dataclass(frozen=True)
class Op:
    launches: int
    bytes: float
    operations: float = 0
    barriers: int = 0

    def seconds(self, chip: Chip, rate: float) -> float:
        body = max(self.bytes / (BANDWIDTH_SHARE * chip.bandwidth), self.operations / rate)
        return body + self.launches * (GAP + RAMP) + self.barriers * BARRIER


@dataclass(frozen=True)
class Step:
    bytes: float
    operations: float
    launches: int
    device: float
    host: float
    captured: bool

    @property
    def eager(self) -> float:
        return max(self.device, self.host)

    @property
    def seconds(self) -> float:
        return self.device if self.captured else self.eager


def rate(form: Form, chip: Chip) -> float:
    ours = OURS_SHARE if form.kind in ("factored", "delta") else 1
    return getattr(chip, form.products) * CUBLAS_SHARE * ours


def group_ops(
    form: Form, group: Group, chip: Chip, rows: int, distinct: int, one_launch: bool | None = None
) -> list[Op]:
    """Activations that fit into L2 stay there; weights are read from memory every time."""

    def activations(width: float) -> float:
        count = 2 * rows * width
        return count if count > chip.l2 else 0

    def product(entries: float, moved: float, copies: int = 1) -> Op:
        return Op(1, copies * entries * form.entry_bytes + moved, 2 * rows * entries)

    x, y = activations(group.inputs), activations(group.out)
    if form.kind == "dense":
        return [product(group.entries, x + y)]
    if form.kind == "merged":
        return [product(group.entries, x + y, distinct)]
    if form.kind in ("factored", "delta"):
        share = 1 if form.kind == "factored" else DELTA_SHARE
        vh, u = group.factors(share)
        rank = share * sum(group.ranks)
        t, scales = activations(rank), SCALE_BYTES * distinct * rank
        if form.kind == "delta":  # W and Vh_k share x; U_k adds to y
            return [product(group.entries + vh, x + y + t), product(u, scales + t + 2 * y)]
        first, second = product(vh, x + t), product(u, scales + t + y)
        if rows <= ONE_LAUNCH_ROWS if one_launch is None else one_launch:
            return [Op(1, first.bytes + second.bytes, first.operations + second.operations, barriers=1)]
        return [first, second]
    a, b = group.lora()
    if form.kind == "lora":
        shrink, expand = Op(1, 2 * distinct * a + x, 2 * rows * a), Op(1, 2 * distinct * b + 2 * y, 2 * rows * b)
        return [product(group.entries, x + y), shrink, expand]
    base = [product(group.inputs * out, x + activations(out)) for out in group.outs]
    adapters = Op(PEFT_LAUNCHES * distinct * len(group.outs), 2 * distinct * (a + b), 2 * rows * (a + b))
    return [*base, adapters]


def step(form: Form, chip: Chip, layers: int, linears: Iterable[Op], rest: Iterable[Op], last: Op) -> Step:
    """`rest` and `last` (all but the target linears) are the same library code in every form."""
    linears, rest = list(linears), list(rest)
    library = chip.bf16 * CUBLAS_SHARE
    device = layers * sum(op.seconds(chip, rate(form, chip)) for op in linears)
    device += layers * sum(op.seconds(chip, library) for op in rest) + last.seconds(chip, library)
    ops = [*linears, *rest]
    launches = layers * sum(op.launches for op in ops) + last.launches
    return Step(
        layers * sum(op.bytes for op in ops) + last.bytes,
        layers * sum(op.operations for op in ops) + last.operations,
        launches,
        device,
        launches * EAGER_CALL,
        captured=form.kind != "peft",  # its copies of indices from the host cannot be captured
    )


def head(model: Model, rows: int) -> Op:
    entries = model.vocab * model.hidden
    return Op(HEAD_LAUNCHES, 2 * entries, 2 * rows * entries)


def linear_ops(form: Form, model: Model, chip: Chip, rows: int, distinct: int, one_launch: bool | None) -> list[Op]:
    return [op for group in model.groups for op in group_ops(form, group, chip, rows, distinct, one_launch)]


def decode(
    form: Form,
    model: Model,
    chip: Chip,
    batch: int,
    experts: int,
    context: int = CONTEXT,
    one_launch: bool | None = None,
) -> Step:
    linears = linear_ops(form, model, chip, batch, min(experts, batch), one_launch)
    kept = batch * context
    rest = Op(REST_LAUNCHES, 2 * 2 * kept * model.kv, 4 * kept * model.hidden)
    return step(form, chip, model.layers, linears, [rest], head(model, batch))


def prefill(form: Form, model: Model, chip: Chip, tokens: int, experts: int) -> Step:
    requests = max(1, tokens // PROMPT)
    linears = linear_ops(form, model, chip, tokens, min(experts, requests), None)
    rest = Op(REST_LAUNCHES, 2 * 2 * tokens * model.kv, 2 * tokens * PROMPT * model.hidden)  # causal: half of 4
    return step(form, chip, model.layers, linears, [rest], head(model, requests))


def memory(form: Form, model: Model, experts: int) -> float:
    """Bytes of weights and of all experts; no cache, no activations."""
    slots = SCALE_BYTES * experts * model.rank
    own = {
        "dense": model.entries * form.entry_bytes,
        "merged": experts * model.entries * form.entry_bytes,
        "factored": model.factored_entries * form.entry_bytes + slots,
        "delta": (model.entries + DELTA_SHARE * model.factored_entries) * form.entry_bytes + DELTA_SHARE * slots,
        "lora": model.entries * form.entry_bytes + 2 * experts * model.lora,
        "peft": model.entries * form.entry_bytes + 2 * experts * model.lora,
    }
    return own[form.kind] + 2 * model.embeddings


def group_seconds(form: Form, group: Group, chip: Chip, rows: int, distinct: int, one: bool | None = None) -> float:
    return sum(op.seconds(chip, rate(form, chip)) for op in group_ops(form, group, chip, rows, distinct, one))


DENSE, MERGED, OURS, OURS8 = (FORMS[name] for name in ("dense bf16", "merged bf16", "factored bf16", "factored int8"))
LORA, LORA8, PEFT = (FORMS[name] for name in ("LoRA r=16 bf16", "LoRA r=16, int8 base", "PEFT LoRA r=16 bf16"))
CROSSINGS = ((OURS, MERGED), (OURS, LORA), (OURS8, LORA8))


@cache
def crossing(ours: Form, peer: Form, model: Model, chip: Chip, batch: int) -> int | None:
    """The fewest distinct experts from which on ours stays ahead, up to one per row."""
    first = None
    for distinct in range(batch, 0, -1):
        if decode(ours, model, chip, batch, distinct).seconds >= decode(peer, model, chip, batch, distinct).seconds:
            break
        first = distinct
    return first


def results() -> dict[str, Any]:
    def times(predict: Callable[..., Step], form: Form, model: Model, chip: Chip, sizes: Iterable[int]) -> Any:
        return {n: {e: round(predict(form, model, chip, n, e).seconds * 1e3, 4) for e in EXPERTS} for n in sizes}

    def every(predict: Callable[..., Step], forms: Iterable[str], sizes: Iterable[int]) -> Any:
        return {
            m.name: {c.name: {f: times(predict, FORMS[f], m, c, sizes) for f in forms} for c in CHIPS.values()}
            for m in MODELS.values()
        }

    return {
        "what": "predictions from data sheets, not measurements",
        "assumptions": {name: globals()[name] for name in ASSUMPTIONS},
        "bars": BARS,
        "chips": [asdict(chip) for chip in CHIPS.values()],
        "models": [asdict(model) for model in MODELS.values()],
        "decode_ms": every(decode, DECODED, BATCHES),
        "prefill_ms": every(prefill, FORMS, TOKENS),
        "decode_ms_by_launches_of_a_group": {
            m.name: {
                c.name: {
                    f.name: {
                        b: {
                            name: round(decode(f, m, c, b, b, one_launch=one).seconds * 1e3, 4)
                            for name, one in (("two", False), ("one", True))
                        }
                        for b in (1, ONE_LAUNCH_ROWS)
                    }
                    for f in (OURS, OURS8)
                }
                for c in CHIPS.values()
            }
            for m in MODELS.values()
        },
        "memory_gb": {
            m.name: {f: {e: round(memory(FORMS[f], m, e) / 1e9, 3) for e in EXPERTS} for f in DECODED}
            for m in MODELS.values()
        },
        "distinct_experts_from_which_ahead": {
            f"{ours.name} / {peer.name}": {
                m.name: {c.name: {b: crossing(ours, peer, m, c, b) for b in (*BATCHES, 256)} for c in CHIPS.values()}
                for m in MODELS.values()
            }
            for ours, peer in CROSSINGS
        },
    }


if __name__ == "__main__":
    from benchmarks import roofline_page

    tyro.cli(roofline_page.main)
