"""Continuous batching: requests join and leave the running batch at any step, each with an expert of its own.

A step is one pass over tokens of many requests, each of which is a row of it: the last token of every running answer,
and up to a limit the next tokens of prompts that are being read. What an earlier prompt with the same expert began with
is not read again. Keys and values stay in the request's row of the cache, which all its tokens look at. Products, the
attention kernel and draws give a token the same bits whoever runs beside it and however its prompt is divided.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import numpy
import torch
import xxhash
from torch import Tensor

from t2.experts.registry import ExpertChoice
from t2.generation.cached_batch import SVFRunner
from t2.generation.head import OutputHead
from t2.generation.row_cache import SPAN, Places, PrefixStore, RowCache, run_pass
from t2.generation.sampling import Sampling, draw_tokens, likeliest_tokens, without_tail
from t2.model.requests import routed_slots
from t2.model.svf_model import SVFModel

T = TypeVar("T")
Reason = Literal["stop", "length", "cancelled", "error"]


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


SWITCH_SECONDS = 5e-4
"""How long the thread beside an engine's may keep the interpreter's lock while the engine waits for it."""
CHECKED = 12
"""Tokens with which a model is checked; no longer than the shortest cache."""
Events = Callable[[Token | Finished], None]
Pass = Callable[[Tensor, Places, Tensor], Tensor]
"""What a pass computes: (ids, places, slots), all [tokens], to what goes into the output embedding, or to logits."""


class QueueFull(RuntimeError):
    """More requests wait than the engine takes."""


@dataclass(eq=False)
class Request:
    """A request that was handed in. `cancel` ends it at the next step."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    likeliest: int | Sequence[int] | None
    events: Events
    slot: int
    expert: bytes
    held: ExitStack
    numbers: numpy.random.Generator
    tokens: list[int] = field(default_factory=list)
    row: int = -1
    read: int = 0
    cached: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def next_tokens(self, most: int) -> list[int]:
        """What the next pass reads of it: a part of the prompt, or the last token of the answer."""
        if self.read < len(self.prompt):
            return list(self.prompt[self.read : self.read + most])
        return self.tokens[-1:]

    @property
    def is_read(self) -> bool:
        return self.read >= len(self.prompt)


class Engine:
    """Runs requests on a wrapped model; `step` by `step`, or in a thread that calls `run`.

    `t2.generation.whole_batches` has one for models that this can't run.

    Args:
        svf: a wrapped transformers model on any device.
        eos_ids: tokens that end an answer.
        max_rows: requests that run at a time.
        max_tokens: most tokens of a request, prompt and answer together. Every row has room for as many keys and
            values; on a CPU memory is taken when that room is first used.
        max_waiting: requests that may wait for a row.
        chunk: most tokens of prompts that a step reads beside the running answers.
        prefix_bytes: memory for beginnings of prompts.

    Raises:
        TypeError: a model that this engine can't run (`RowCache.of`), or that gives other logits in passes of single
            tokens than for all tokens at once.
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
        self.prefixes = PrefixStore(prefix_bytes)
        self.compiled: Pass | None = None
        """Runs passes in place of the model (`t2.generation.compiled_pass`)."""
        self.after_events: Callable[[], object] = lambda: None
        """Is called by the thread that steps, once for all events of a step."""
        self._told = False
        self.tokens_made = 0
        self._running: list[Request] = []
        self._free = list(range(max_rows))
        self._waiting: deque[Request] = deque()
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._changed = threading.Condition()
        self._ended = threading.Event()  # no `run` is going on
        self._ended.set()
        self._closing = False
        self.failure: BaseException | None = None
        """What ended the engine, if anything did."""
        self._prepare()

    def _prepare(self) -> None:
        """Makes what passes need, and checks that the model can be run."""
        capacity = -(-self.max_tokens // SPAN) * SPAN
        self.cache = RowCache.of(self.svf.model, self.max_rows + 1, capacity)  # the last row is for checks
        self.head = OutputHead.of(SVFRunner(self.svf))
        self._check_model()

    @property
    def cache_bytes(self) -> int:
        """Memory that rows of the cache may take."""
        return self.cache.nbytes

    # Requests

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(
        self,
        prompt: Sequence[int],
        events: Events,
        *,
        max_tokens: int,
        expert: ExpertChoice = None,
        sampling: Sampling | None = None,
        likeliest: int | Sequence[int] | None = None,
        ahead: bool = False,
    ) -> Request:
        """Hands in a request, which keeps the expert that it names now. Any thread may.

        Args:
            prompt: token ids.
            events: is given each token, then the end, by the thread that steps; it must not take long.
            max_tokens: most tokens of the answer.
            likeliest: how many of the likeliest tokens' log-probabilities come with each token, or of which tokens;
                None is no log-probabilities at all.
            ahead: takes the next free row, before all that wait.

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
        if isinstance(likeliest, int) and not 0 <= likeliest <= self.vocabulary:
            raise ValueError(f"likeliest: expected None or a number from 0 to {self.vocabulary}, got {likeliest}")
        if isinstance(likeliest, Sequence) and not all(0 <= token < self.vocabulary for token in likeliest):
            raise ValueError(f"likeliest: expected tokens from 0 to {self.vocabulary - 1}, got {list(likeliest)}")
        sampling = sampling or Sampling()
        with ExitStack() as held:
            (slot,) = self.svf.bank.hold_slots([expert], held)
            scales = self.svf.slot_table.table[slot].cpu().numpy()  # nobody writes to a slot that is held
            request = Request(
                tokens,
                max_tokens,
                sampling,
                likeliest,
                events,
                slot,
                xxhash.xxh3_128(scales.tobytes()).digest(),
                held,
                numpy.random.default_rng(sampling.seed),
            )
            with self._changed:
                self._check_open()
                if len(self._waiting) >= self.max_waiting:
                    raise QueueFull(f"engine: {len(self._waiting)} requests wait, as many as may")
                request.held = held.pop_all()
                (self._waiting.appendleft if ahead else self._waiting.append)(request)
                self._changed.notify()
        return request

    def _check_open(self) -> None:
        if self.failure is not None or self._closing:
            raise RuntimeError("engine: expected one that runs, got one that has ended") from self.failure

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Runs other work with the model between two steps, in the thread that makes them."""
        made: Future[T] = Future()
        with self._changed:
            self._check_open()
            self._calls.append((work, cast("Future[object]", made)))
            self._changed.notify()
        return made

    # Steps

    def run(self, until: threading.Event | None = None) -> None:
        """Steps in this thread, whenever there is something to do, until `close`, or until the event and a `wake`."""
        until = until or threading.Event()
        self._ended.clear()
        try:
            while True:
                with self._changed:
                    while not (until.is_set() or self._closing or self._waiting or self._calls or self.running):
                        self._changed.wait()
                if until.is_set() or (not self.step() and self._closing):
                    return
        except Exception as error:
            with self._changed:
                self.failure = error
            for request in self._all():
                self._finish(request, "error", f"{type(error).__name__}: {error}")
            self._running = []
            self._waiting.clear()
            for _, made in self._calls:
                if made.set_running_or_notify_cancel():
                    made.set_exception(error)
            self._end_step()
        finally:
            self._ended.set()

    def wake(self) -> None:
        """Lets `run` look at its event."""
        with self._changed:
            self._changed.notify_all()

    def alongside(
        self,
        work: Coroutine[Any, Any, T],
        on_signal: Callable[[int, Any], object] | None = None,
        new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    ) -> T:
        """Runs `work` in an event loop in a thread of its own, and steps in this one until it is done.

        This thread keeps the threads of parallel loops that it has from loading the model. Those of a second one would
        make all of them sleep between loops: OpenMP lets threads wait actively only while they are no more than cores.
        So `work`, and threads that it starts, compute with one.

        Args:
            on_signal: handles SIGINT and SIGTERM meanwhile; by default SIGINT cancels `work`, and KeyboardInterrupt is
                raised when it has ended.
            new_loop: makes the event loop.

        Raises:
            What `work` raises.
        """
        threads, done, result = torch.get_num_threads(), threading.Event(), Future[T]()
        interval = sys.getswitchinterval()
        cancel: list[Callable[[], object]] = []
        interrupted = False

        async def cancellable() -> T:
            task, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert task is not None
            cancel.append(lambda: loop.call_soon_threadsafe(task.cancel))
            if interrupted:
                work.close()
                raise asyncio.CancelledError
            return await work

        def aside() -> None:
            torch.set_num_threads(1)  # of this thread and of new ones
            try:
                with asyncio.Runner(loop_factory=new_loop) as runner:
                    result.set_result(runner.run(cancellable()))
            except BaseException as error:
                result.set_exception(error)
            done.set()
            self.wake()

        def interrupt(*_: object) -> None:
            nonlocal interrupted
            interrupted = True
            for each in cancel:
                each()

        thread = threading.Thread(target=aside, name="t2-loop", daemon=True)
        signals = (signal.SIGINT,) if on_signal is None else (signal.SIGINT, signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, on_signal or interrupt) for number in signals} if is_main else {}
        try:
            sys.setswitchinterval(SWITCH_SECONDS)
            thread.start()
            self.run(done)
            thread.join()
        finally:
            sys.setswitchinterval(interval)
            for number, handler in before.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
        if interrupted:
            raise KeyboardInterrupt
        return result.result()

    def close(self, *, drain: bool = False) -> None:
        """Ends `run`, after its step or, with `drain`, when all have their answer; without one it steps itself."""
        with self._changed:
            self._closing = True
            if not drain:
                for request in self._all():
                    request.cancel()
            self._changed.notify_all()
        if not self._ended.is_set():
            self._ended.wait()
        while self.failure is None and self.step():
            pass

    def _all(self) -> list[Request]:
        return [*self._running, *self._waiting]

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass over the running requests; False once there is nothing left to do."""
        while self._calls:
            work, made = self._calls.popleft()
            if made.set_running_or_notify_cancel():
                try:
                    made.set_result(work())
                except Exception as error:
                    made.set_exception(error)
        self._drop_cancelled()
        self._admit()
        if self._running:
            self._pass()
        self._end_step()
        return bool(self._running or self._waiting)

    def _tell(self, request: Request, event: Token | Finished) -> None:
        request.events(event)
        self._told = True

    def _end_step(self) -> None:
        if self._told:
            self._told = False
            self.after_events()

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [request for request in self._waiting if request.cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._finish(request, "cancelled")
        for request in [request for request in self._running if request.cancelled]:
            self._leave(request, "cancelled")

    def _admit(self) -> None:
        """Gives waiting requests the rows that are free."""
        while self._free and self._waiting:
            with self._changed:
                request = self._waiting.popleft()
            request.row = self._free.pop()
            self._running.append(request)

    def _pass(self) -> None:
        """Reads a token of each answer, and prompts in the order they came, as far as there is room for them."""
        room, parts = self.chunk, list[tuple[Request, list[int]]]()
        for request in self._running:
            if not request.read and room:
                known = self.prefixes.load(request.expert, request.prompt, self.cache, request.row)
                request.read = request.cached = known
            tokens = request.next_tokens(room)
            room -= 0 if request.is_read else len(tokens)
            if tokens:
                parts.append((request, tokens))
        each = [(request, i, token) for request, tokens in parts for i, token in enumerate(tokens)]
        longest = max(request.read + len(tokens) for request, tokens in parts)
        device = self.svf.sigma.device
        inputs = (
            [token for _, _, token in each],
            [request.row for request, _, _ in each],
            [request.read + i for request, i, _ in each],
            [request.slot for request, _, _ in each],
        )
        ids, rows, positions, slots = torch.tensor(inputs, device=device).unbind()
        length = min(-(-longest // SPAN) * SPAN, self.cache.capacity)
        ends, last = [], -1
        for request, tokens in parts:
            last += len(tokens)
            request.read += len(tokens)
            if request.is_read:
                ends.append((last, request))
        states = (self.compiled or self.run_model)(ids, Places(rows, positions, length), slots)
        if len(ends) < len(each):
            states = states[torch.tensor([end for end, _ in ends], dtype=torch.int64, device=device)]
        logits = states if self.head is None or not len(ends) else self.head(states)
        for request, _ in parts:
            if not request.tokens:
                self.prefixes.save(request.expert, request.prompt[: request.read], self.cache, request.row)
        if ends:
            self._choose(logits, [request for _, request in ends])

    def run_model(self, ids: Tensor, places: Places, slots: Tensor) -> Tensor:
        """One pass of the model as it is: what goes into the output embedding, or the logits, [tokens, ...]."""
        with routed_slots(self.svf.decomposed, slots), nullcontext() if self.head is None else self.head.left_out():
            return run_pass(self.svf.model, self.cache, places, ids)

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Compares a pass of single tokens, in a row that no request has, with the model's own way to read them."""
        each = torch.arange(CHECKED, device=self.svf.sigma.device)
        ids, kind = (each * 97 + self.vocabulary // 3) % self.vocabulary, type(self.svf.model).__name__
        try:
            states = self.run_model(
                ids, Places(torch.full_like(each, self.max_rows), each, SPAN), torch.zeros_like(each)
            )
            want: Tensor = self.svf.model(input_ids=ids[None], use_cache=False).logits[0]
        except Exception as error:
            raise TypeError(f"model: expected one that reads single tokens of a batch, got {kind}: {error}") from error
        got = states if self.head is None else self.head(states)
        got, want = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (got, want))
        distance = ((got - want).norm(dim=-1) / want.norm(dim=-1)).median()
        if not distance <= 0.25:  # bfloat16 differs by 0.05, most tokens in a wrong order by 1; also where there is NaN
            raise TypeError(
                f"model: expected the same logits for tokens one by one and together, got others from {kind}"
            )

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Gives these requests their next token, and lets those go that end with it."""
        chosen = likeliest_tokens(logits)
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
            self._tell(request, _with_log_p(logits[i], token, request.likeliest))
        for request in requests:
            if request.tokens[-1] in self.eos_ids:
                self._leave(request, "stop")
            elif len(request.tokens) == request.max_tokens:
                self._leave(request, "length")

    def _leave(self, request: Request, reason: Reason) -> None:
        """Ends a running request, whose row is free from now on."""
        self._running.remove(request)
        self._free.append(request.row)
        self._finish(request, reason)

    def _finish(self, request: Request, reason: Reason, error: str = "") -> None:
        request.held.close()
        self._tell(request, Finished(reason, error))


def _with_log_p(logits: Tensor, token: int, likeliest: int | Sequence[int] | None) -> Token:
    if likeliest is None:
        return Token(token)
    log_p = torch.log_softmax(logits.float(), dim=-1)
    if isinstance(likeliest, int):
        values, tokens = log_p.topk(likeliest)
        likeliest = tokens.tolist()
    else:
        values = log_p[list(likeliest)]
    return Token(token, float(log_p[token]), tuple(zip(likeliest, values.tolist(), strict=True)))
