"""A short probe of a model before and after its layers are replaced: does each request still get what it should?

Before: which target layers see the requests in the first dimension of their input (where the first request is replaced
by a copy of the last, its rows have to become those of the last, and no others may change), and how far the outputs
move when each layer's product is off by the rounding of its factors' storage. After: with z = 1 the outputs are the
base's but for that, and in a batch of several experts each row is the same as when all rows have its expert.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from t2.model.layers import RoutedLinear
from t2.weights.targets import Linear, Unsuitable

if TYPE_CHECKING:
    from t2.model.svf_model import SVFModel

ROWS, LENGTHS = 3, (8, 5, 7)
ROUNDING = {
    torch.float32: 1e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
    torch.int8: 1e-2,
    torch.float8_e4m3fn: 4e-2,
}
"""Relative error of a product, by the storage of its factors or the dtype of its input."""
MARGIN = 10.0
"""Outputs may move so many times as far as with that error."""
STD = 0.3
"""Of z - 1 in the experts of the probe."""


DIFFERENT = 0.1
"""Inputs of a layer that are further apart, relative to their size, are others."""


class VerificationError(ValueError):
    """A wrapped model does not compute what it should."""


Inputs = Mapping[str, Any]


def input_candidates(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments of a forward pass of three ragged rows, likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(model, PreTrainedModel):
        yield from _transformers_inputs(model, set(parameters), device)
        return
    first = next((name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD), None)
    if first is None:
        return
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
    if embedding is not None:
        ids = _ids(embedding.num_embeddings, set(), device)
        yield {first: ids}
        if "labels" in parameters:
            yield {first: ids, "labels": ids}
    if linear is not None:
        dtype = linear.weight.dtype
        yield {first: _normal(ROWS, max(LENGTHS), linear.in_features).to(device, dtype)}
        yield {first: _normal(ROWS, linear.in_features).to(device, dtype)}


def _transformers_inputs(model: PreTrainedModel, names: set[str], device: torch.device) -> Iterator[Inputs]:
    config, dtype = model.config, model.dtype
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    special = {value for c in (config, text) for name, value in vars(c).items() if _is_token(name, value)}
    vocabulary = getattr(text, "vocab_size", None)
    mask = _mask(device)
    more: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names and vocabulary:
        more["decoder_input_ids"] = _ids(vocabulary, special, device)[:, :5]
    main = model.main_input_name
    if "input_ids" in names and vocabulary:
        ids, bos = _ids(vocabulary, special, device), getattr(text, "bos_token_id", None)
        if isinstance(bos, int) and 0 <= bos < vocabulary:  # rows begin as prompts do
            ids = torch.where(mask & (mask.cumsum(1) == 1), bos, ids)
        if "attention_mask" in names:
            pad = getattr(text, "pad_token_id", None)
            pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
            yield {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long(), **more}
        yield {"input_ids": ids, **more}
    if main == "pixel_values" or (main not in ("input_ids",) and "pixel_values" in names):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        yield {
            "pixel_values": _normal(ROWS, getattr(vision, "num_channels", 3), height, width).to(device, dtype),
            **more,
        }
    if "input_features" in names:
        bins = next((n for n in (getattr(config, a, None) for a in ("num_mel_bins", "feature_size")) if n), 80)
        frames = 2 * getattr(config, "max_source_positions", 50)
        yield {"input_features": _normal(ROWS, bins, frames).to(device, dtype), **more}
        yield {"input_features": _normal(ROWS, 64, bins).to(device, dtype), **more}
    if "input_values" in names:
        yield {"input_values": _normal(ROWS, 4000).to(device, dtype), **more}
    hidden = getattr(text, "hidden_size", None)
    if "inputs_embeds" in names and hidden:
        yield {"inputs_embeds": _normal(ROWS, max(LENGTHS), hidden).to(device, dtype), **more}


def _is_token(name: str, value: object) -> bool:
    return isinstance(value, int) and name.endswith(("_token_id", "_token_index", "_token"))


def _ids(vocabulary: int, special: set[int], device: torch.device) -> Tensor:
    allowed = [i for i in range(min(vocabulary, 2000)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(len(allowed), (ROWS, max(LENGTHS)), generator=generator)
    return torch.tensor(allowed)[chosen].to(device)


def _mask(device: torch.device) -> Tensor:
    """Rows of LENGTHS tokens, padded on the left."""
    longest = max(LENGTHS)
    return torch.stack([torch.arange(longest) >= longest - length for length in LENGTHS]).to(device)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@dataclass
class Call:
    """A layer's input: its shape, and a few random sums over each of its rows."""

    name: str
    shape: torch.Size
    rows: Tensor

    @classmethod
    def of(cls, name: str, x: Tensor) -> Call:
        flat = x.detach().reshape(x.shape[0] if x.dim() else 1, -1).float()
        mixing = torch.randn(flat.shape[1], 16, generator=torch.Generator().manual_seed(5)).to(x.device)
        return cls(name, x.shape, flat @ mixing)


Calls = list[Call]


@dataclass
class Probe:
    """Inputs that a model takes, and what came of them before any layer was replaced."""

    inputs: Inputs
    rows: int
    output: Tensor | None = None
    bound: float = 0.0
    tokens: Tensor | None = None  # what `generated` gave
    calls: Calls = field(default_factory=list)

    @classmethod
    def of_call(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Probe | None:
        """The inputs of a call, if running them again can do no harm: tensors, numbers and flags alone."""
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return None
        inputs: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            inputs |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        if not all(value is None or isinstance(value, Tensor | bool | int | float | str) for value in inputs.values()):
            return None
        rows = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)
        return cls(inputs, rows) if rows > 1 else None

    @classmethod
    def of(cls, model: nn.Module, example: Inputs | None = None) -> Probe | None:
        """The first inputs that the model takes; None where there are none.

        Raises:
            ValueError: there are none, but an example was given.
        """
        if example is not None:
            rows = next((value.shape[0] for value in example.values() if isinstance(value, Tensor)), 0)
            if rows < 2:
                raise ValueError(f"example_inputs: expected tensors of at least 2 rows by name, got {rows} rows")
            try:
                return cls(example, rows, _run(model, example, rows))
            except Exception as error:
                raise ValueError(f"example_inputs: expected inputs that the model takes, got {error!r}") from error
        for inputs in input_candidates(model):
            try:
                output = _run(model, inputs, ROWS)
            except Exception:  # not the inputs of this model
                continue
            if bool(output.isfinite().any()):
                return cls(inputs, ROWS, output)
        return None

    def look(self, model: nn.Module, targets: Mapping[str, Linear], rounding: float) -> Unsuitable:
        """Runs the plain model: which targets see no requests in their rows, and how far rounding moves the outputs."""
        with _recording(targets) as self.calls:
            _run(model, self.inputs, self.rows)
        copied = self._calls_with_a_copy(model, targets)
        with _rounding(targets.values(), rounding):
            moved = _run(model, self.inputs, self.rows)
        assert self.output is not None
        self.bound = MARGIN * float(_off(moved, self.output).max()) + 10 * rounding
        self.tokens = self.generated(model)
        return Unsuitable({name: why for name in targets if (why := self._why_not(name, copied))})

    def look_rows(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Unsuitable:
        """The part of `look` that needs no plain model."""
        with _recording(layers) as self.calls:
            _run(model, self.inputs, self.rows)
        copied = self._calls_with_a_copy(model, layers)
        return Unsuitable({name: why for name in layers if (why := self._why_not(name, copied))})

    def _calls_with_a_copy(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Calls:
        """Of a batch whose first request is the last one."""

        def changed(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == self.rows
            return torch.cat([value[-1:], value[1:]]) if batched else value

        with _recording(layers) as calls:
            _run(model, {name: changed(value) for name, value in self.inputs.items()}, self.rows)
        return calls

    def _why_not(self, name: str, copied: Calls) -> str | None:
        first, second = ([call for call in calls if call.name == name] for calls in (self.calls, copied))
        if not first:
            return "not called in a forward pass; a module around it may read its weight"
        if len(first) != len(second):
            return "called more often for some requests than for others"
        for x, y in zip(first, second, strict=True):
            rows = len(x.rows)
            if not rows or rows % self.rows or x.shape != y.shape:
                return "the first dimension of its input is not that of the batch"
            own = rows // self.rows
            if float(_off(y.rows, torch.cat([x.rows[-own:], x.rows[own:]])).max()) > DIFFERENT:
                return "its input has no row of its own for each request, or rows depend on the rest of the batch"
        return None

    def generated(self, model: nn.Module, rows: Sequence[int] | None = None) -> Tensor | None:
        """Logits of generated tokens, which are given; None where the model does not generate from the inputs.

        rows: those that get the tokens they always get, while the others get some of their neighbours'.
        """
        ids, generate = self.inputs.get("input_ids"), getattr(model, "generate", None)
        if ids is None or generate is None:
            return None
        tokens = ids[:, -1].tolist()
        if rows is not None:
            tokens = [tokens[row if row in rows else row - 1] for row in range(self.rows)]
        inputs = {name: value for name, value in self.inputs.items() if name in ("input_ids", "attention_mask")}
        try:
            with _evaluating(model):
                made = generate(
                    **inputs,
                    prefix_allowed_tokens_fn=lambda row, _: [tokens[row]],
                    max_new_tokens=3,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=int(ids[0, -1]),
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            return torch.stack(made.logits, 1).float()
        except Exception:  # a model that has the method and can't
            return None


@dataclass
class Trouble:
    """A fault of a wrapped model: the layers to leave out, or none if that does not help, and what happened."""

    names: list[str]
    cause: str


def check(svf: SVFModel, probe: Probe, rounding: float, *, base: bool = True) -> Trouble | None:
    """Runs the wrapped model; None if it does what it should.

    base: whether the plain model's outputs are there to compare with.
    """
    layers = {name: m for name, m in svf.model.named_modules() if isinstance(m, RoutedLinear)}
    exact = rounding <= 10 * ROUNDING[torch.float32]
    tight = 1e-3 if exact else 2e-2
    generator = torch.Generator().manual_seed(3)
    experts = [1 + STD * torch.randn(svf.layout.R, generator=generator) for _ in range(2)]
    choices = [(*experts, None)[row % 3] for row in range(probe.rows)]

    def run(choice: Any) -> Tensor:
        with svf.route(choice):
            return _run(svf.model, probe.inputs, probe.rows)

    def generated(choice: Any, rows: Sequence[int] | None = None) -> Tensor | None:
        with svf.route(choice):
            return probe.generated(svf.model, rows)

    def calls(choice: Any) -> Calls:
        with _recording(layers) as made:
            run(choice)
        return made

    try:
        plain = run(None)
        if base:
            assert probe.output is not None
            off = distance(plain, probe.output, probe.bound, exact=exact)
            if off is not None:
                where = _first(calls(None), probe.calls)
                return Trouble([], f"with z = 1 outputs are off by {off:.2g} of their size{where}")
        mixed = run(choices)
        answers = generated(None) if probe.tokens is not None or not base else None
        if base and answers is not None and _differ(answers, probe.tokens, probe.bound, exact):
            return Trouble([], "with z = 1 tokens that are generated are others than the plain model's")
        answers = None if answers is None else generated(choices)
        for expert in (*experts, None):
            rows = [row for row, choice in enumerate(choices) if choice is expert]
            wanted = plain if expert is None else run(expert)
            off = distance(mixed[rows], wanted[rows], tight, exact=True)
            if off is not None:
                together, alone = (_of_requests(calls(choice), rows, probe.rows) for choice in (choices, expert))
                where = _first(together, alone)
                return Trouble([], f"in a batch of several experts a row is off by {off:.2g} of its size{where}")
            if answers is not None and _differ(answers, generated(expert, rows), tight, True, rows):
                return Trouble([], "tokens that are generated for a request depend on the other requests of its batch")
    except Exception as error:
        return Trouble(_culprits(error, layers, lambda: run(None)), f"{type(error).__name__}: {error}")
    return None


def distance(got: Tensor, want: Tensor, bound: float, *, exact: bool) -> float | None:
    """How far outputs are off, if they are: any token's, or unless `exact` those of more than a quarter.

    Rounding lets the routers of a mixture of experts choose others for a token here and there.
    """
    if got.shape != want.shape:
        return float("inf")
    off = _off(got, want)
    share = float((off > bound).float().mean())
    return float(off.max()) if share > (0.0 if exact else 0.25) else None


def _differ(
    got: Tensor | None, want: Tensor | None, bound: float, exact: bool, rows: Sequence[int] | None = None
) -> bool:
    """Whether generated tokens' logits do: those of all requests, or of some."""
    if got is None or want is None:
        return True
    chosen = slice(None) if rows is None else list(rows)
    return distance(got[chosen], want[chosen], bound, exact=exact) is not None


def _of_requests(calls: Calls, requests: Sequence[int], count: int) -> Calls:
    """What these of a batch's requests have in the inputs."""
    return [
        replace(call, rows=call.rows.unflatten(0, (count, -1))[list(requests)]) if len(call.rows) % count == 0 else call
        for call in calls
    ]


def _first(calls: Calls, wanted: Calls) -> str:
    """Between which calls outputs went astray, for errors."""
    before = "the input"
    for call, want in zip(calls, wanted, strict=False):
        if call.shape != want.shape or float(_off(call.rows, want.rows).max()) > DIFFERENT:
            return f", first between {before} and {call.name}"
        before = call.name
    return f", after {before}"


def _culprits(error: BaseException, layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[str]:
    """The layers to leave out for an error: the one whose weight was read last, or those right below its module."""
    reads: list[str] = []

    def watched(self: RoutedLinear, name: str) -> Any:
        if name == "weight" and sys._getframe(1).f_globals.get("__name__") != RoutedLinear.__module__:
            reads.append(self.name)
        return nn.Module.__getattr__(self, name)

    RoutedLinear.__getattr__ = watched  # type: ignore[assignment]
    try:
        run()
    except Exception:
        if reads:
            return reads[-1:]
    finally:
        del RoutedLinear.__getattr__
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    names = {id(module): name for name, module in layers.items()}
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            if id(module) in names:
                return [names[id(module)]]
            below = [names[id(child)] for child in module.children() if id(child) in names]
            if below:
                return below
    return []


# Running


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode, with a fixed random state; all as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[device.index for device in devices]):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, inputs: Inputs, rows: int) -> Tensor:
    with _evaluating(model):
        return _output(model(**inputs), rows)


def _output(result: Any, rows: int) -> Tensor:
    """The tensor of an output that has a row for each request, as float32."""
    if isinstance(result, Mapping):
        preferred = [result[name] for name in ("logits", "last_hidden_state") if result.get(name) is not None]
        values = [*preferred, *result.values()]
    else:
        values = list(result) if isinstance(result, tuple | list) else [result]
    for value in values:
        if isinstance(value, tuple | list) and value:
            value = value[0]
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.shape[0] == rows:
            return value.detach().float()
    raise ValueError("expected an output with a row for each request, got none")


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[Calls]:
    """The inputs of these layers, in the order of their calls."""
    calls: Calls = []

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if x is not None:
                calls.append(Call.of(name, x))

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounding(layers: Any, size: float) -> Iterator[None]:
    """Outputs of these layers are off by `size` of their own size."""
    generator = torch.Generator().manual_seed(4)

    def hook(_: nn.Module, args: Any, y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        noise = torch.randn(y.shape, generator=generator).to(y.device)
        return (y + size * noise * y.float().square().mean(-1, keepdim=True).sqrt()).to(y.dtype)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _off(got: Tensor, want: Tensor) -> Tensor:
    """Distance of each last dimension, relative to the size of a typical one; what is NaN on both sides agrees."""
    got, want = got.float(), want.float()
    both = ~(want.isfinite() | got.isfinite())
    got, want = got.masked_fill(both, 0), want.masked_fill(both, 0)
    size = want.norm(dim=-1)
    typical = size.flatten().nanmedian().clamp(min=1e-30) if size.numel() else size
    return ((got - want).norm(dim=-1) / torch.maximum(size, typical)).nan_to_num(float("inf"))
