"""The output embedding apart from the rest of a model: for some of its tokens, or some at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2.generation.cached_batch import Runner
from t2.weights.targets import output_embedding

_lock = threading.Lock()


class OutputHead:
    """The output embedding of a model whose logits are its output as it is. Make one with `OutputHead.of`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @classmethod
    def of(cls, runner: Runner) -> OutputHead | None:
        """None where the model has no such module, or changes what it gives (soft caps, scales)."""
        head = output_embedding(runner.transformer)
        if head is None:
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
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self._module.parameters())

    @property
    def _module(self) -> nn.Module:
        module = output_embedding(self._runner.transformer)
        assert module is not None
        return module

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within the block, in this thread, the model's logits are what its output embedding would read, [..., hidden].

        Other threads may run the model meanwhile, as it is.
        """
        module, here = self._module, threading.get_ident()
        with _lock:
            threads = module.__dict__.setdefault("_t2_left_out_by", list[int]())
            threads.append(here)
            module.__dict__["forward"] = functools.partial(_unless_left_out, module, threads)
        try:
            yield
        finally:
            with _lock:
                threads.remove(here)
                if not threads:
                    del module.__dict__["forward"], module.__dict__["_t2_left_out_by"]

    def __call__(self, states: Tensor) -> Tensor:
        logits: Tensor = self._module(states)
        return logits


def _unless_left_out(module: nn.Module, threads: list[int], states: Tensor) -> Tensor:
    logits: Tensor = states if threading.get_ident() in threads else type(module).forward(module, states)
    return logits
