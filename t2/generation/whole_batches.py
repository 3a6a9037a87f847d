"""The engine of models that single tokens of many requests can't run through: batches by transformers' `generate`.

These are models whose cache holds a state instead of keys and values, or both. Requests that wait become a batch, and
others wait for its end. All else is as in `Engine`: experts, draws, log-probabilities, events.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from t2.generation.batching import pad
from t2.generation.engine import Engine, Request
from t2.model.requests import routed_slots


class WholeBatchEngine(Engine):
    """An `Engine` whose step is a whole batch; arguments as there.

    Raises:
        TypeError: a model that does not generate behind its prompt.
    """

    def _prepare(self) -> None:
        model = self.svf.model
        if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
            raise TypeError(f"model: expected a decoder of transformers that generates, got {type(model).__name__}")

    @property
    def cache_bytes(self) -> int:
        return 0

    def _pass(self) -> None:
        requests, device = list(self._running), self.svf.sigma.device
        ids, mask = pad([torch.tensor(request.prompt) for request in requests], 0, left=True)
        for request in requests:
            request.read = len(request.prompt)
        batch = _Batch(self, requests)
        options = GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.eos_ids) or [self.vocabulary],
            pad_token_id=0,
        )
        model: Any = self.svf.model
        with routed_slots(self.svf.decomposed, torch.tensor([request.slot for request in requests], device=device)):
            model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=options,
                logits_processor=LogitsProcessorList([batch]),
                stopping_criteria=StoppingCriteriaList([_Ended(batch)]),
            )

    def _choose_all(self, logits: Tensor, batch: list[Request]) -> None:
        """The next token of the requests of a batch that still run; tells the events of it."""
        for request in [request for request in batch if request.cancelled and request in self._running]:
            self._leave(request, "cancelled")
        places = [place for place, request in enumerate(batch) if request in self._running]
        if places:
            self._choose(logits[places], [batch[place] for place in places])
        self._end_step()


class _Batch(LogitsProcessor):
    """Lets an engine choose the tokens of a batch."""

    def __init__(self, engine: WholeBatchEngine, requests: list[Request]) -> None:
        self.engine, self.requests = engine, requests

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.engine._choose_all(scores, self.requests)
        chosen = torch.tensor([request.tokens[-1] if request.tokens else 0 for request in self.requests])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None].to(scores.device), 0.0)

    def ended(self) -> list[bool]:
        return [request not in self.engine._running for request in self.requests]


class _Ended(StoppingCriteria):
    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.tensor(self._batch.ended(), device=input_ids.device)
