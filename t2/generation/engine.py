"""Continuous batching: requests join and leave the running batch at any step, each with an expert of its own.

A request waits until a row is free. Its prompt is read in chunks beside the running answers, in a row of its own; what
another prompt with the same expert began with is not read again. Then it joins the rows that get a token each in every
step. Products, the attention kernel and draws give a row the same bits whoever runs beside it and however its prompt is
divided.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import numpy
import torch
import xxhash
from torch import Tensor

from t2.experts.registry import ExpertChoice
from t2.generation.row_cache import SPAN, DecodeStep, PrefixStore, PromptChunk, RowCache
from t2.generation.sampling import draw_tokens, without_tail
from t2.model.attention import by_query
from t2.model.requests import routed_slots
from t2.model.svf_model import SVFModel

T = TypeVar("T")
Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn from the nucleus of `top_p` with the seed's numbers.

    seed: None is a new one for each request.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected an integer of at most 64 bits, got {self.seed}")


@dataclass(frozen=True)
class Token:
    """One new token, with its log-probability and the likeliest ones' where these were asked for."""

    id: int
    log_p: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer; `error` says what went wrong where the reason is "error"."""

    reason: Reason
    error: str = ""


Events = Callable[[Token | Finished], None]


class QueueFull(RuntimeError):
    """More requests wait than the engine takes."""


@dataclass(eq=False)
class Request:
    """A request that was handed in. `cancel` ends it at the next step."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    likeliest: int | None
    events: Events
    slot: int
    expert: bytes
    held: ExitStack
    numbers: numpy.random.Generator
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    @property
    def position(self) -> int:
        """The place of the last token, which the next step reads."""
        return len(self.prompt) + len(self.tokens) - 1


class Engine:
    """Runs requests on a wrapped model; `step` by `step`, or in a thread of its own between `start` and `close`.

    Args:
        svf: a wrapped transformers model on any device.
        eos_ids: tokens that end an answer.
        max_rows: requests that run at a time.
        max_tokens: most tokens of a request, prompt and answer together. A row's keys and values take so much room at
            most; buffers grow to the longest request there was.
        max_waiting: requests that may wait for a row.
        chunk: tokens of prompts that are read between two steps of the running answers.
        prefix_bytes: memory for beginnings of prompts.

    Raises:
        TypeError: a model that this engine can't run (`RowCache.of`).
    """

    def __init__(
        self,
        svf: SVFModel,
        *,
        eos_ids: Sequence[int],
        max_rows: int = 32,
        max_tokens: int = 2048,
        max_waiting: int = 1024,
        chunk: int = 256,
        prefix_bytes: int = 256 << 20,
    ) -> None:
        if not isinstance(svf, SVFModel):
            raise TypeError(f"svf: expected a t2.SVFModel, got {type(svf).__name__}")
        limits = {"max_rows": max_rows, "max_tokens": max_tokens, "max_waiting": max_waiting, "chunk": chunk}
        for name, value in limits.items():
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        self.svf, self.eos_ids = svf, frozenset(eos_ids)
        self.max_rows, self.max_tokens, self.max_waiting, self.chunk = max_rows, max_tokens, max_waiting, chunk
        self.vocabulary = int(svf.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.cache = RowCache.of(svf.model, max_rows + 1)
        self.prefixes = PrefixStore(prefix_bytes)
        self.steps = self.tokens_read = self.tokens_made = 0
        self._running: list[Request] = []
        self._reading: Request | None = None
        self._waiting: deque[Request] = deque()
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.failure: BaseException | None = None
        """What ended the engine, if anything did."""

    # Requests

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running) + (self._reading is not None)

    def submit(
        self,
        prompt: Sequence[int],
        events: Events,
        *,
        max_tokens: int,
        expert: ExpertChoice = None,
        sampling: Sampling | None = None,
        likeliest: int | None = None,
    ) -> Request:
        """Hands in a request, which keeps the expert that it names now. Any thread may.

        Args:
            prompt: token ids.
            events: is given each token, then the end, by the thread that steps; it must not take long.
            max_tokens: most tokens of the answer.
            likeliest: how many of the likeliest tokens' log-probabilities come with each token; None is no
                log-probabilities at all.

        Raises:
            TypeError, ValueError: a prompt that is empty, too long or not of this vocabulary, or an expert that the
                model has not.
            QueueFull: too many wait. RuntimeError: the engine has ended.
        """
        tokens = tuple(prompt)
        if not tokens or not all(isinstance(token, int) and 0 <= token < self.vocabulary for token in tokens):
            raise ValueError(f"prompt: expected token ids from 0 to {self.vocabulary - 1}, at least one")
        if max_tokens < 1 or len(tokens) + max_tokens > self.max_tokens:
            raise ValueError(
                f"max_tokens: expected at least 1, and prompt and answer of at most {self.max_tokens} tokens together, "
                f"got {len(tokens)} and {max_tokens}"
            )
        if likeliest is not None and not 0 <= likeliest <= self.vocabulary:
            raise ValueError(f"likeliest: expected None or a number from 0 to {self.vocabulary}, got {likeliest}")
        sampling = sampling or Sampling()
        with self._changed:
            if self.failure is not None or self._closing:
                raise RuntimeError("engine: expected one that runs, got one that has ended") from self.failure
            if len(self._waiting) >= self.max_waiting:
                raise QueueFull(f"engine: {len(self._waiting)} requests wait, as many as may")
        registry, held = self.svf.bank, ExitStack()
        z = registry.z_of(expert).detach()
        (slot,) = registry.hold_slots([expert], held)
        request = Request(
            tokens,
            max_tokens,
            sampling,
            likeliest,
            events,
            slot,
            b"" if expert is None else xxhash.xxh3_128(z.cpu().contiguous().numpy().tobytes()).digest(),
            held,
            numpy.random.default_rng(sampling.seed),
        )
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        return request

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Runs other work with the model between two steps, in the thread that makes them."""
        made: Future[T] = Future()
        with self._changed:
            if self.failure is not None or self._closing:
                raise RuntimeError("engine: expected one that runs, got one that has ended") from self.failure
            self._calls.append((work, cast("Future[object]", made)))
            self._changed.notify()
        return made

    # Steps

    def start(self) -> None:
        """Steps in a thread, whenever there is something to do."""
        if self._thread is not None:
            raise RuntimeError("start: expected an engine without a thread, got one that was started")
        self._thread = threading.Thread(target=self._loop, name="t2-engine", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = False) -> None:
        """Ends the thread: after the step that runs or, with `drain`, when all requests have their answer."""
        with self._changed:
            self._closing = True
            if not drain:
                for request in self._all():
                    request.cancel()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting or self._calls or self.running):
                    self._changed.wait()
            try:
                if not self.step() and self._closing:
                    return
            except BaseException as error:
                with self._changed:
                    self.failure = error
                for request in self._all():
                    self._finish(request, "error", f"{type(error).__name__}: {error}")
                self._running, self._reading = [], None
                self._waiting.clear()
                for _, made in self._calls:
                    made.set_exception(error)
                return

    def _all(self) -> list[Request]:
        return [*self._running, *([] if self._reading is None else [self._reading]), *self._waiting]

    @torch.inference_mode()
    def step(self) -> bool:
        """Reads prompts, then makes one token for each running request; False if there was nothing to do."""
        while self._calls:
            work, made = self._calls.popleft()
            if made.set_running_or_notify_cancel():
                try:
                    made.set_result(work())
                except Exception as error:
                    made.set_exception(error)
        self._drop_cancelled()
        room = self.chunk
        while room > 0 and self._next_prompt() is not None:
            room -= self._read_chunk(room)
        if self._running:
            self._decode()
        self.steps += 1
        return bool(self._running or self._reading or self._waiting)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [request for request in self._waiting if request.cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._finish(request, "cancelled")
        if self._reading is not None and self._reading.cancelled:
            self._finish(self._reading, "cancelled")
            self._reading = None
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row, "cancelled")

    def _next_prompt(self) -> Request | None:
        """The request whose prompt is read now, in the last row."""
        if self._reading is None and len(self._running) < self.max_rows:
            with self._changed:
                self._reading = self._waiting.popleft() if self._waiting else None
            if self._reading is not None:
                request = self._reading
                self.cache.reserve(len(request.prompt) + request.max_tokens)
                request.read = request.cached = self.prefixes.load(
                    request.expert, request.prompt, self.cache, self.max_rows
                )
        return self._reading

    def _read_chunk(self, room: int) -> int:
        """Reads up to `room` tokens of the prompt; with its last one comes the first token of the answer."""
        request = self._reading
        assert request is not None
        start, end = request.read, min(len(request.prompt), request.read + room)
        device = self.svf.sigma.device
        places = torch.arange(start, end, device=device)
        self.cache.place = PromptChunk(self.max_rows, start)
        mask = torch.arange(end, device=device) <= places[:, None]
        with routed_slots(self.svf.decomposed, [request.slot]), by_query():
            logits = self._forward(torch.tensor([request.prompt[start:end]], device=device), mask[None], places[None])
        request.read = end
        self.tokens_read += end - start
        if end == len(request.prompt):
            self.prefixes.save(request.expert, request.prompt, self.cache, self.max_rows)
            self.cache.copy(self.max_rows, len(self._running), end)
            self._running.append(request)
            self._reading = None
            self._choose(logits, [len(self._running) - 1])
        return end - start

    def _decode(self) -> None:
        device, running = self.svf.sigma.device, self._running
        positions = torch.tensor([request.position for request in running], device=device)
        longest = max(request.position for request in running) + 1
        length = min(-(-longest // SPAN) * SPAN, self.cache.capacity)
        self.cache.place = DecodeStep(positions, length)
        ids = torch.tensor([[request.tokens[-1]] for request in running], device=device)
        mask = torch.arange(length, device=device) <= positions[:, None]
        with routed_slots(self.svf.decomposed, [request.slot for request in running]):
            logits = self._forward(ids, mask[:, None], positions[:, None])
        self._choose(logits, list(range(len(running))))

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after the last of the tokens [rows, tokens]; mask [rows, tokens, length]."""
        logits: Tensor = self.svf.model(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _choose(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Gives these rows their next token, and lets those go that end with it."""
        requests = [self._running[row] for row in rows]
        chosen = logits.argmax(-1)
        drawn = [i for i, request in enumerate(requests) if request.sampling.temperature > 0]
        if drawn:
            options = [requests[i].sampling for i in drawn]
            numbers = [requests[i].numbers.random() for i in drawn]
            temperature, top_p, uniforms = (
                torch.tensor(values, dtype=torch.float64, device=logits.device)
                for values in ([o.temperature for o in options], [o.top_p for o in options], numbers)
            )
            own = logits[drawn].float() / temperature[:, None].float()
            chosen[drawn] = draw_tokens(without_tail(own, top_p), uniforms)
        ids = chosen.tolist()
        self.tokens_made += len(ids)
        for i, (request, token) in enumerate(zip(requests, ids, strict=True)):
            request.tokens.append(token)
            request.events(_with_log_p(logits[i], token, request.likeliest))
        for row in sorted(rows, reverse=True):
            request = self._running[row]
            if request.tokens[-1] in self.eos_ids:
                self._leave(row, "stop")
            elif len(request.tokens) == request.max_tokens:
                self._leave(row, "length")

    def _leave(self, row: int, reason: Reason) -> None:
        """Ends a running request; the last row takes its place."""
        request, last = self._running[row], self._running.pop()
        if last is not request:
            self.cache.copy(len(self._running), row, last.position + 1)
            self._running[row] = last
        self._finish(request, reason)

    def _finish(self, request: Request, reason: Reason, error: str = "") -> None:
        request.held.close()
        request.events(Finished(reason, error))


def _with_log_p(logits: Tensor, token: int, likeliest: int | None) -> Token:
    if likeliest is None:
        return Token(token)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    top = log_p.topk(likeliest) if likeliest else None
    pairs = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token, float(log_p[token]), pairs)
