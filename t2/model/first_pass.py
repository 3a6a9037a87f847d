"""The first pass of `generate(adapt=...)`: a strategy reads the prompts and chooses each request's expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from t2.experts.registry import ExpertChoice


class Chosen(Protocol):
    """The outcome of a first pass (`t2.adaptation.Adaptation`)."""

    def choices(self, svf: Any) -> list[ExpertChoice]:
        """The expert of each request, as `SVFModel.generate(experts=...)` takes it."""


class Strategy(Protocol):
    """A strategy as `generate` needs it (`t2.adaptation.Strategy`)."""

    name: str

    def adapt(self, prompts: Sequence[Any]) -> Chosen:
        """Chooses an expert for each prompt: a text, an example of a task, or a conversation."""

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """The user's words in each row of a batch."""


class FirstPass:
    """Strategies by name, and the outcome of the last pass."""

    def __init__(self) -> None:
        self.strategies: dict[str, Strategy] = {}
        self.last: Any = None

    def strategy(self, strategy: Strategy | str) -> Strategy:
        """The strategy itself, or the registered one of this name.

        Raises:
            TypeError, ValueError: no strategy, or an unknown name.
        """
        if not isinstance(strategy, str):
            if not callable(getattr(strategy, "adapt", None)):
                raise TypeError(f"adapt: expected a strategy or the name of one, got {type(strategy).__name__}")
            return strategy
        if strategy not in self.strategies:
            known = ", ".join(self.strategies) or "none: set_adaptation() adds one"
            raise ValueError(f"adapt: expected a strategy or one of {known}, got {strategy!r}")
        return self.strategies[strategy]

    def run(
        self,
        svf: Any,
        adapt: Strategy | str,
        prompts: Sequence[Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[ExpertChoice]:
        """Chooses an expert for each prompt, or for each row of the `generate` call's input ids."""
        strategy = self.strategy(adapt)
        if prompts is None:
            ids = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs"), *args) if t is not None), None)
            if ids is None:
                raise ValueError("prompts: expected the requests' texts where generate gets no input_ids, got none")
            prompts = strategy.read(ids, kwargs.get("attention_mask"))
        self.last = strategy.adapt(prompts)
        choices: list[ExpertChoice] = self.last.choices(svf)
        return choices
