"""docs/roofline.md, its plots and results/roofline.json, from the model in benchmarks/roofline.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence

from benchmarks.readme import ROOT, table
from benchmarks.results_cpu import RESULTS
from benchmarks.roofline import (
    BANDWIDTH_SHARE,
    BARRIER,
    BARS,
    BATCHES,
    CHIPS,
    CONTEXT,
    CROSSINGS,
    CUBLAS_SHARE,
    DECODED,
    DENSE,
    EAGER_CALL,
    EXPERTS,
    FORMS,
    GAP,
    LORA,
    LORA8,
    LORA_RANK,
    MODELS,
    ONE_LAUNCH_ROWS,
    OURS,
    OURS8,
    OURS_SHARE,
    PEFT,
    PEFT_LAUNCHES,
    PROMPT,
    RAMP,
    REST_LAUNCHES,
    TOKENS,
    Chip,
    Form,
    Group,
    Model,
    Step,
    crossing,
    decode,
    group_ops,
    group_seconds,
    memory,
    prefill,
    results,
)

SMALL, LARGE, LARGEST = (MODELS[name] for name in ("SmolLM2-135M", "Llama-3-8B", "Llama-3-70B"))
H200 = CHIPS["H200"]
PAIRS = [(model, chip) for model in MODELS.values() for chip in CHIPS.values()]
DENSE8, DENSE8X8, OURS8X8 = (
    FORMS[name] for name in ("dense int8", "dense int8, int8 products", "factored int8, int8 products")
)
GPT_FAST = (Model("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000), 104.9, 200)  # its README: tokens/s; tokens generated
TICKS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)  # ms of the plots


def figures() -> str:
    text = json.dumps(results(), indent=1)
    return re.sub(r"\{[^{}]*\}", lambda match: " ".join(match[0].split()), text) + "\n"


def ms(seconds: float, fits: bool = True) -> str:
    text = f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"
    return text if fits else f"({text})"


def fits(form: Form, model: Model, chip: Chip, experts: int) -> bool:
    return memory(form, model, experts) <= chip.memory


def cell(name: str, model: Model, chip: Chip, rows: int, experts: int, predict: Callable[..., Step] = decode) -> str:
    form = FORMS[name]
    return ms(predict(form, model, chip, rows, experts).seconds, fits(form, model, chip, experts))


def under(ratio: float, bar: float, digits: int = 2) -> str:
    return f"{ratio:.{digits}f}" + ("" if ratio <= bar else " (over)")


def span(values: Iterable[float], form: str = ".2f") -> str:
    found = sorted(values)
    low, high = f"{found[0]:{form}}", f"{found[-1]:{form}}"
    return low if low == high else f"{low} to {high}"


def chips() -> str:
    rows = [
        [
            chip.name,
            f"{chip.bandwidth / 1e12:.2f}",
            *(f"{peak / 1e12:,.0f}" if peak else "" for peak in (chip.bf16, chip.fp8, chip.int8)),
            f"{chip.l2 / 1e6:.0f}",
            f"{chip.memory / 1e9:.0f}",
            f"{CUBLAS_SHARE * chip.bf16 / (BANDWIDTH_SHARE * chip.bandwidth):.0f}",
        ]
        for chip in CHIPS.values()
    ]
    names = [
        "TB/s",
        "bf16, Tops/s",
        "fp8",
        "int8",
        "L2, MB",
        "memory, GB",
        "rows where bf16 turns from bytes to arithmetic",
    ]
    return table(["", *names], rows)


def models() -> str:
    rows = [
        [
            m.name,
            f"{m.entries:,}",
            f"{m.factored_entries / m.entries:.3f}",
            f"{m.rank:,}",
            f"{m.lora:,}",
            f"{(m.factored_entries - m.entries) / m.lora:.0f}",
            *(f"{decode(form, m, H200, 32, 32).launches:,}" for form in (DENSE, OURS, LORA, PEFT)),
        ]
        for m in MODELS.values()
    ]
    names = ["weights", "factored / dense", "one expert", "one LoRA r=16", "adapters in what factors add"]
    return table(["all linears", *names, "launches, 32 experts: dense", "factored", "LoRA", "PEFT"], rows)


def decode_tables() -> tuple[str, str, str]:
    most = BATCHES[-1]
    counts = [e for e in EXPERTS if e <= most]
    by_batch = [[f, *(cell(f, LARGE, H200, b, b) for b in BATCHES)] for f in DECODED]
    by_experts = [[f, *(cell(f, LARGE, H200, most, e) for e in counts)] for f in DECODED]
    everywhere = [
        [f"{m.name}, {c.name}", str(b), *(cell(f, m, c, b, b) for f in DECODED)] for m, c in PAIRS for b in (1, 32)
    ]
    return (
        table(["rows, each its own expert", *map(str, BATCHES)], by_batch),
        table([f"distinct experts in {most} rows", *map(str, counts)], by_experts),
        table(["", "rows", *DECODED], everywhere),
    )


def prefill_table() -> str:
    rows = [
        [f"{m.name}, {n:,} tokens", *(cell(f, m, H200, n, n // PROMPT, prefill) for f in FORMS)]
        for m in MODELS.values()
        for n in TOKENS
    ]
    return table(["", *FORMS], rows)


def memory_table() -> str:
    counts = (1, 16, 64, 256)
    rows = [
        [f"{m.name}, {f}", *(f"{memory(FORMS[f], m, e) / 1e9:,.1f}" for e in counts)]
        for m in (SMALL, LARGE, LARGEST)
        for f in DECODED
        if FORMS[f] is not PEFT
    ]
    return table(["experts held", *map(str, counts)], rows)


def crossing_table(ours: Form, peer: Form) -> str:
    batches = (8, 16, 32, 64, 256)
    rows = [
        [f"{m.name}, {c.name}", *(str(crossing(ours, peer, m, c, b) or "never") for b in batches)] for m, c in PAIRS
    ]
    return f"{ours.name} against {peer.name}:\n\n" + table(["rows", *map(str, batches)], rows)


def launch_table() -> str:
    rows = []
    for m, form in ((LARGE, OURS), (LARGE, OURS8), (SMALL, OURS)):
        for b in (1, ONE_LAUNCH_ROWS):
            two, one = (decode(form, m, H200, b, b, one_launch=one).seconds for one in (False, True))
            groups = [[group_seconds(form, g, H200, b, b, one) * 1e6 for one in (False, True)] for g in m.groups]
            saved = [f"{(two - one) * 1e6 / b:.0f}", f"{(two - one) / two:.1%}"]
            times = [*(f"{many:.1f}, {single:.1f}" for many, single in groups), f"{ms(two)}, {ms(one)}"]
            rows.append([f"{m.name}, {form.name}, B = {b}", *times, *saved])
    heads = [*(f"{g.name}, µs" for g in LARGE.groups), "step, ms", "saved a token, µs", "share of the step"]
    return table(["two launches, one launch", *heads], rows)


def bandwidth_table() -> str:
    def share(form: Form, group: Group, batch: int) -> float:
        moved = sum(op.bytes for op in group_ops(form, group, H200, batch, batch))
        return moved / group_seconds(form, group, H200, batch, batch) / H200.bandwidth

    rows = [
        [f"{m.name}, {form.name}, B = {b}", *(f"{share(form, g, b):.0%}" for g in m.groups)]
        for m in (SMALL, LARGE, LARGEST)
        for form in (OURS, OURS8)
        for b in (1, 32)
    ]
    return table(["", *(g.name for g in LARGE.groups)], rows)


def shapes(model: Model) -> list[Group]:
    found = dict.fromkeys((out, group.inputs) for group in model.groups for out in group.outs)
    return [Group(f"{out} x {inputs}", inputs, (out,)) for out, inputs in found]


def factored_over_dense(group: Group, rows: int, ours: Form = OURS) -> float:
    return group_seconds(ours, group, H200, rows, 1) / group_seconds(DENSE, group, H200, rows, 1)


def shape_table() -> str:
    rows = []
    for m in (SMALL, LARGE, LARGEST):
        for group in shapes(m):
            limit = sum(group.factors()) / group.entries
            ratios = (
                under(factored_over_dense(group, n), BARS["factored / dense over 1 + min/max"] * limit)
                for n in (1, 32, *TOKENS)
            )
            int8 = f"{factored_over_dense(group, 1, OURS8):.2f}"
            rows.append([f"{m.name}, {group.name}", f"{limit:.2f}", *ratios, int8])
    counts = ["B = 1", "B = 32", *(f"{n:,} tokens" for n in TOKENS)]
    return table(["out x in", "1 + min/max", *counts, "int8 / dense bf16, B = 1"], rows)


def products_table() -> str:
    def limit(group: Group, tokens: int) -> float:
        return 2e6 * tokens * sum(group.factors()) / (CUBLAS_SHARE * H200.bf16)

    rows = [[g.name, *(f"{limit(g, n):.0f}, {limit(g, n) / OURS_SHARE:.0f}" for n in TOKENS)] for g in shapes(LARGE)]
    return table(["cuBLAS, ours at most; µs", *(f"{n:,} tokens" for n in TOKENS)], rows)


def experts_table() -> str:
    def times(m: Model, f: Form, experts: int) -> tuple[float, float, float]:
        q = group_seconds(f, Group("q", m.hidden, (m.hidden,)), H200, 64, experts)
        linears = sum(group_seconds(f, g, H200, 64, experts) for g in m.groups)
        return q, linears, decode(f, m, H200, 64, experts).seconds

    rows = []
    for m in MODELS.values():
        for f in (OURS, OURS8):
            ratios = [many / one for many, one in zip(times(m, f, 64), times(m, f, 1), strict=True)]
            rows.append([f"{m.name}, {f.name}", *(under(r, BARS["64 distinct experts / 1"], 3) for r in ratios)])
    return table(["64 rows", "q alone", "all linears", "step"], rows)


def peft_table() -> str:
    rows = []
    for m in MODELS.values():
        peft, ours = (decode(form, m, H200, 32, 32) for form in (PEFT, OURS))
        ratios = (peft.seconds / ours.seconds, peft.seconds / ours.eager, peft.device / ours.seconds)
        times = (peft.seconds, ours.seconds, ours.eager)
        rows.append([m.name, f"{peft.launches:,}", *map(ms, times), *(f"{r:.0f}" for r in ratios)])
    heads = ["launches of PEFT", "PEFT, ms", "ours, ms", "ours eager, ms", "PEFT / ours", "PEFT / ours eager"]
    return table(["32 rows, 32 experts", *heads, "PEFT on a host that costs nothing / ours"], rows)


def document() -> str:
    by_batch, by_experts, everywhere = decode_tables()
    crossings = "\n\n".join(crossing_table(ours, peer) for ours, peer in CROSSINGS)
    published, reported, context = GPT_FAST
    predicted = 1 / decode(DENSE, published, CHIPS["A100"], 1, 1, context).seconds
    gap, ramp, barrier, call = (f"{seconds * 1e6:.1f} µs" for seconds in (GAP, RAMP, BARRIER, EAGER_CALL))
    launch, saved = GAP + RAMP, GAP + RAMP - BARRIER
    bandwidth, products, experts, shape, peft = BARS.values()
    most = TOKENS[-1]
    groups = " and ".join(f"{m.layers * len(m.groups)} groups a step of {m.name}" for m in (LARGE, SMALL))

    def over(ours: Form, peer: Form, predict: Callable[..., Step], rows: int) -> str:
        ratios = span(predict(ours, m, c, rows, 1).seconds / predict(peer, m, c, rows, 1).seconds for m, c in PAIRS)
        return f"{ratios} times {peer.name}"

    return f"""# GPU roofline

**Predictions from data sheets, not measurements.** No GPU ran for this page; a measurement belongs beside its
prediction. `benchmarks/roofline.py` writes it, and `benchmarks/results/roofline.json` with every time for every GPU,
batch and number of experts.

## Method

Time of an operation = max(bytes / bandwidth, operations / rate) + launches x launch cost. Bytes are the weights, once
per launch, and activations that exceed L2. A decode step has all linears, a cache of {CONTEXT:,} tokens a request,
{REST_LAUNCHES} launches a layer for the rest, and the head in bf16; prefill has requests of {PROMPT} tokens.

| assumption | |
| --- | ---: |
| bandwidth reached, of the data sheet's | {BANDWIDTH_SHARE:.0%} |
| rate that cuBLAS reaches, of the data sheet's | {CUBLAS_SHARE:.0%} |
| rate that our products reach, of cuBLAS | {OURS_SHARE:.0%} |
| launch in a CUDA graph: gap + ramp | {gap} + {ramp} |
| barrier over the grid in the one-launch kernel, which prefetches the second product's weights before it | {barrier} |
| launch from Python; the host runs ahead, the slower of the two counts | {call} |

- **dense**: one model, no experts. int8 is storage, products are bf16 unless the name says more.
- **merged**: each distinct expert in the batch reads its own W', all in one grouped launch.
- **factored**: ours. q k v are one group, gate up another; 2 launches a group, 1 up to {ONE_LAUNCH_ROWS} rows. int8
  is the format of the CPU kernels, {FORMS["factored int8"].entry_bytes:.3f} bytes an entry.
- **delta r/8**: W x and r/8 components, the same ones for all experts; 2 launches a group.
- **LoRA r={LORA_RANK}**: a base product and two gathered ones a group, as in Punica and S-LoRA. Every distinct
  adapter is read.
- **PEFT**: `adapter_names`, {PEFT_LAUNCHES} launches per matrix and adapter; it copies indices from the host, so no
  CUDA graph.

Left out: bytes of norms and logits, tiles that rows do not fill, weights that stay in L2 from step to step (a small
model on a large L2), communication. Times in brackets do not fit into one GPU's memory, even without a cache.

One published figure to compare with: gpt-fast reports {reported} tokens/s for {published.name}, dense bf16, one
request, on an A100 limited to 330 W. This model says {predicted:.0f}: {predicted / reported - 1:.0%} more.

{chips()}

{models()}

## Decoding, milliseconds a step

{LARGE.name} on {H200.name}:

{by_batch}

{by_experts}

![time by distinct experts](roofline-experts.png)
![time by batch](roofline-batch.png)

{everywhere}

**Where factored loses.** It reads {LARGE.factored_entries / LARGE.entries:.2f} times the bytes of the dense linears of
{LARGE.name}. Over these models and GPUs a step with one row takes:

- bf16: {over(OURS, DENSE, decode, 1)}, {over(OURS, LORA, decode, 1)};
- int8: {over(OURS8, DENSE, decode, 1)}, {over(OURS8, DENSE8, decode, 1)}, {over(OURS8, LORA8, decode, 1)}.

One expert for a long time should be merged. Against gathered LoRA the number of distinct adapters decides: below.

## Memory of weights and experts, GB

{memory_table()}

## Prefill, milliseconds, {H200.name}, each request its own expert

{prefill_table()}

Prefill is arithmetic, and factored has more of it. At {most:,} tokens with one expert it takes
{over(OURS, DENSE, prefill, most)}, {over(OURS, LORA, prefill, most)}.
With int8 products, {over(OURS8X8, DENSE, prefill, most)}, but {over(OURS8X8, DENSE8X8, prefill, most)}.

## From how many distinct experts on factored is ahead

By decode times, whether it fits into memory or not; "never": not even with an expert for every row. Against LoRA in
bf16, bytes alone would cross at the adapters "in what factors add" of the table above; fewer launches move that down,
with many rows more arithmetic moves it up.

{crossings}

## One launch or two

A second launch costs {launch * 1e6:.1f} µs, a barrier {barrier}: {saved * 1e6:.1f} µs saved a group, in
{groups}. Both read the same bytes.
{H200.name}, each row its own expert:

{launch_table()}

A barrier of {launch * 1e6:.1f} µs would save nothing, one without cost {launch / saved:.2f} times as much.

## What a GPU run will be held to

{H200.name}. A benchmark has to take turns over more weights than L2 holds, or it measures the cache.

**{bandwidth:.0%} of the bandwidth at B <= 32.** Assumed here for the kernel alone; with launches it leaves these
shares, so the bar has to be measured without them:

{bandwidth_table()}

**{products:.0%} of the two cuBLAS products in prefill.** Assumed as well; {LARGE.name}:

{products_table()}

**64 distinct experts / 1 at most {experts}.** What is added are rows of the slot table:

{experts_table()}

**Factored / dense at most {shape - 1:.0%} over 1 + min/max.** "(over)" where the model itself is: small matrices have
the second launch, or the barrier, to carry. In prefill two bars contradict each other: {products:.0%} of cuBLAS is
{1 / products - 1:.0%} over, this one asks for {1 / shape:.0%} of it.

{shape_table()}

**{peft} times PEFT's mixed batch at 32 distinct experts:**

{peft_table()}
"""


def plot(
    name: str, title: str, axis_label: str, points: Sequence[int], predict: Callable[[Form, int], tuple[float, bool]]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5))
    for i, form in enumerate(DECODED):
        found = [predict(FORMS[form], point) for point in points]
        kept = [(p, t * 1e3) for p, (t, fit) in zip(points, found, strict=True) if fit]
        last = kept[-1][1]
        label = form if last <= TICKS[-1] else f"{form} (to {last:.0f})"
        style, width = ("o-", 2.2) if form.startswith("factored") else (".--", 1.2)
        axis.plot(*zip(*kept, strict=True), style, linewidth=width, color=f"C{i}", label=label)
    axis.set(xlabel=axis_label, ylabel="predicted ms a step", xscale="log", yscale="log")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(points, [str(point) for point in points])
    axis.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_ylim(TICKS[0], TICKS[-1])
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / name, dpi=100)


def main() -> None:
    (RESULTS / "roofline.json").write_text(figures())
    (ROOT / "docs" / "roofline.md").write_text(document())
    most = BATCHES[-1]
    plot(
        "roofline-experts.png",
        f"{LARGE.name}, {H200.name}, {most} rows; merged while it fits into memory",
        "distinct experts",
        [e for e in EXPERTS if e <= most],
        lambda form, e: (decode(form, LARGE, H200, most, e).seconds, fits(form, LARGE, H200, e)),
    )
    plot(
        "roofline-batch.png",
        f"{LARGE.name}, {H200.name}, each row its own expert; merged while it fits into memory",
        "rows",
        BATCHES,
        lambda form, b: (decode(form, LARGE, H200, b, b).seconds, fits(form, LARGE, H200, b)),
    )
