"""The output embedding apart from the rest of a model: a loss over the vocabulary takes it some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2.generation.cached_batch import Runner
from t2.weights.targets import output_embedding


class OutputHead:
    """The frozen output embedding of a model whose logits are its output as it is. Make one with `OutputHead.of`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @classmethod
    def of(cls, runner: Runner) -> OutputHead | None:
        """None where the model has no such module, trains it, or changes what it gives (soft caps, scales)."""
        head = output_embedding(runner.transformer)
        if head is None or any(parameter.requires_grad for parameter in head.parameters()):
            return None
        given: list[Tensor] = []

        def replaced(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            given.append(torch.linspace(-100, 100, output.numel()).reshape(output.shape).to(output))
            return given[-1]

        hook = head.register_forward_hook(replaced)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=next(head.parameters()).device)
        try:
            with torch.no_grad():
                logits = runner.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        finally:
            hook.remove()
        return cls(runner) if len(given) == 1 and torch.equal(given[0], logits) else None

    @property
    def _module(self) -> nn.Module:
        module = output_embedding(self._runner.transformer)
        assert module is not None
        return module

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within the block the model's logits are what its output embedding would read, [..., hidden]."""
        module = self._module
        module.__dict__["forward"] = lambda states: states
        try:
            yield
        finally:
            del module.__dict__["forward"]

    def __call__(self, states: Tensor) -> Tensor:
        logits: Tensor = self._module(states)
        return logits
