"""A short probe of a model: the inputs of its target layers, and how far rounding moves its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from t2.model.probe_inputs import ROWS, Inputs, input_candidates
from t2.weights.fused_experts import UnfusedExperts, parents_of
from t2.weights.targets import Unsuitable

MARGIN = 10.0
"""Outputs may move this many times as far as with that error."""
DIFFERENT = 0.1
"""Inputs of a layer that are further apart, relative to their size, are others."""


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
    _parents: dict[str, str] = field(default_factory=dict)

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
                return cls(example, rows, run_model(model, example, rows))
            except Exception as error:
                raise ValueError(f"example_inputs: expected inputs that the model takes, got {error!r}") from error
        for inputs in input_candidates(model):
            try:
                output = run_model(model, inputs, ROWS)
            except Exception:  # not the inputs of this model
                continue
            if bool(output.isfinite().any()):
                return cls(inputs, ROWS, output)
        return None

    def look(self, model: nn.Module, targets: Mapping[str, nn.Module], rounding: float) -> Unsuitable:
        """Runs the plain model: which targets see no requests in their rows, and how far rounding moves the outputs."""
        watched = self._watched(model, targets)
        with recording(watched) as self.calls:
            run_model(model, self.inputs, self.rows)
        copied = self._calls_with_a_copy(model, watched)
        with rounded(targets.values(), rounding):
            moved = run_model(model, self.inputs, self.rows)
        assert self.output is not None
        self.bound = MARGIN * float(relative_error(moved, self.output).max()) + 10 * rounding
        self.tokens = self.generated(model)
        return Unsuitable({name: why for name in targets if (why := self._why_not(name, copied))})

    def look_rows(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Unsuitable:
        """The part of `look` that needs no plain model."""
        watched = self._watched(model, layers)
        with recording(watched) as self.calls:
            run_model(model, self.inputs, self.rows)
        copied = self._calls_with_a_copy(model, watched)
        return Unsuitable({name: why for name in layers if (why := self._why_not(name, copied))})

    def _calls_with_a_copy(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Calls:
        """Calls of a batch whose first request is a copy of the last one."""

        def changed(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.dim() and value.shape[0] == self.rows
            return torch.cat([value[-1:], value[1:]]) if batched else value

        with recording(layers) as calls:
            run_model(model, {name: changed(value) for name, value in self.inputs.items()}, self.rows)
        return calls

    def _watched(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The modules whose rows are looked at: the layers, or the experts of a mixture that they are of."""
        parents = {name: _called_with_requests(model, *experts) for name, experts in parents_of(model).items()}
        self._parents = {name: parents[name][0] for name in layers if name in parents}
        return dict(parents.get(name, (name, layer)) for name, layer in layers.items())

    def _why_not(self, name: str, copied: Calls) -> str | None:
        name = self._parents.get(name, name)
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
            if float(relative_error(y.rows, torch.cat([x.rows[-own:], x.rows[own:]])).max()) > DIFFERENT:
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


def run_model(model: nn.Module, inputs: Inputs, rows: int) -> Tensor:
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
def recording(layers: Mapping[str, nn.Module]) -> Iterator[Calls]:
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
def rounded(layers: Any, size: float) -> Iterator[None]:
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


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Distance of each last dimension, relative to the size of a typical one; what is NaN on both sides agrees."""
    got, want = got.float(), want.float()
    both = ~(want.isfinite() | got.isfinite())
    got, want = got.masked_fill(both, 0), want.masked_fill(both, 0)
    size = want.norm(dim=-1)
    typical = size.flatten().nanmedian().clamp(min=1e-30) if size.numel() else size
    return ((got - want).norm(dim=-1) / torch.maximum(size, typical)).nan_to_num(float("inf"))


def _called_with_requests(model: nn.Module, name: str, experts: UnfusedExperts) -> tuple[str, nn.Module]:
    """The experts of a mixture, or the block around them where they get a copy of all tokens for each expert."""
    if not experts.form.takes_all:
        return name, experts
    block = name.rpartition(".")[0]
    return block, model.get_submodule(block)
