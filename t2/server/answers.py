"""Answers of the engine as they come: text, log-probabilities, and why they end."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from t2.generation.engine import Engine, Finished, QueueFull, Request, Token
from t2.generation.prompts import encode
from t2.generation.sampling import Sampling
from t2.server.errors import ApiError
from t2.server.experts import Chosen
from t2.server.text import GrowingText
from t2.tasks.base import Problem


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], str]:
    """Token ids of a conversation, and the user's last words, which pass one reads.

    Raises:
        ApiError: 400 for messages that the chat template refuses.
    """
    said = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    try:
        tokens = [int(token) for token in encode(Problem(said), tokenizer)]
    except (TemplateError, ValueError) as error:
        raise ApiError(400, f"messages: the model's chat template refuses them: {error}", "messages") from error
    return tokens, next((message["content"] for message in reversed(said) if message["role"] == "user"), "")


@dataclass(frozen=True)
class Piece:
    """Text that is certain now, the tokens it took, and the reason in the last piece."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None

    def __add__(self, later: Piece) -> Piece:
        return Piece(self.text + later.text, self.tokens + later.tokens, later.finish)


class Mail:
    """Brings the events of an engine's thread to this loop, all of a step at once.

    Waking the loop for each event would make the engine wait for the interpreter's lock each time.
    """

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self._letters: deque[tuple[Inbox, int, Token | Finished]] = deque()
        engine.after_events = self._wake

    def post(self, inbox: Inbox, place: int, event: Token | Finished) -> None:
        """For the engine's thread: leaves an event for the answer at this place."""
        self._letters.append((inbox, place, event))

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._letters:
            inbox, place, event = self._letters.popleft()
            inbox.events.setdefault(place, []).append(event)
            inbox.come.set()


@dataclass
class Inbox:
    """Events that have come for some answers, by their place."""

    events: dict[int, list[Token | Finished]] = field(default_factory=dict)
    come: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Answer:
    """One answer as it grows."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: Set[int]
    request: Request
    text: GrowingText
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    made: int = 0
    finish: str | None = None
    _held: list[Token] = field(default_factory=list)

    def take(self, events: Sequence[Token | Finished]) -> Piece | None:
        """What these events make certain; None for nothing yet, or after the end.

        Raises:
            ApiError: 500 where the engine failed.
        """
        if self.finish is not None:
            return None
        text = ""
        for event in events:
            if isinstance(event, Finished):
                if event.reason == "error":
                    raise ApiError(500, f"the engine failed: {event.error}")
                text, self.finish = text + self.text.end(), event.reason
                break
            self.made += 1
            if self.first_token is None:
                self.first_token = time.perf_counter() - self.started
            if event.id in self.eos_ids:
                continue
            self._held.append(event)
            text += self.text.add(event.id)
            if self.text.stopped:
                self.finish = "stop"
                self.request.cancel()
                break
        if not text and self.finish is None:
            return None
        tokens, self._held = tuple(self._held), []
        return Piece(text, tokens, self.finish)

    def token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def chat_log_p(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """`logprobs` of a chat completion."""

        def entry(token: int, log_p: float | None) -> dict[str, Any]:
            text = self.token_text(token)
            return {"token": text, "logprob": log_p, "bytes": list(text.encode())}

        content = [
            entry(token.id, token.log_p) | {"top_logprobs": [entry(other, log_p) for other, log_p in token.likeliest]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def completion_log_p(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """`logprobs` of a completion; `offset`: characters of the answer before these tokens."""
        texts = [self.token_text(token.id) for token in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.log_p for token in tokens],
            "top_logprobs": [{self.token_text(other): log_p for other, log_p in token.likeliest} for token in tokens],
            "text_offset": offsets,
        }


class Answers:
    """Some answers that belong together, from their requests on.

    Args:
        mail: of the loop that reads them.
        seconds: the longest that all of them may take.
    """

    def __init__(self, mail: Mail, engine: Engine, tokenizer: PreTrainedTokenizerBase, seconds: float) -> None:
        self._mail, self._engine, self._tokenizer, self._seconds = mail, engine, tokenizer, seconds
        self._inbox = Inbox()
        self.each: list[Answer] = []

    def begin(
        self,
        prompt: Sequence[int],
        chosen: Chosen,
        *,
        max_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        likeliest: int | None = None,
    ) -> Answer:
        """Hands a request in.

        Raises:
            ApiError: 400 for a prompt that is too long, 404 for an expert that is gone, 429 where too many wait, 503
                where the engine has ended.
        """
        engine, place = self._engine, len(self.each)
        room = engine.max_tokens - len(prompt)
        if room < max_tokens:
            raise ApiError(
                400,
                f"max_tokens: expected at most {max(room, 0)} behind this prompt of {len(prompt)} tokens, of "
                f"{engine.max_tokens} in all; got {max_tokens}",
                "max_tokens",
                "context_length_exceeded",
            )
        try:
            request = engine.submit(
                prompt,
                functools.partial(self._mail.post, self._inbox, place),
                max_tokens=max_tokens,
                expert=chosen.choice,
                sampling=sampling,
                likeliest=likeliest,
            )
        except QueueFull as error:
            raise ApiError(429, "the server is busy; try again later", code="queue_full") from error
        except ValueError as error:
            status = 404 if isinstance(chosen.choice, str) and chosen.choice not in engine.svf.bank else 400
            raise ApiError(status, str(error), "model" if status == 404 else "prompt") from error
        except RuntimeError as error:
            raise ApiError(503, "the engine has ended") from error
        answer = Answer(self._tokenizer, engine.eos_ids, request, GrowingText(self._tokenizer, stops))
        self.each.append(answer)
        return answer

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """The answers piece by piece, with their places; may be read once. Leaving it early cancels all requests.

        Raises:
            ApiError: 500 where the engine failed, 504 after the longest time.
        """
        inbox, left, late = self._inbox, len(self.each), False

        def expire() -> None:
            nonlocal late
            late = True
            inbox.come.set()

        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._seconds, expire) if self._seconds < float("inf") else None
        try:
            while left:
                await inbox.come.wait()
                inbox.come.clear()
                events, inbox.events = inbox.events, {}
                found = [(place, self.each[place].take(each)) for place, each in events.items()]
                pieces = [(place, piece) for place, piece in found if piece is not None]
                left -= sum(piece.finish is not None for _, piece in pieces)
                if pieces:
                    yield pieces
                if left and late:
                    raise ApiError(504, f"no whole answer in {self._seconds:g} s", code="timeout")
        finally:
            if timer is not None:
                timer.cancel()
            self.cancel()

    async def whole(self) -> list[Piece]:
        """All answers, each in one piece."""
        found = [Piece("") for _ in self.each]
        async for pieces in self.pieces():
            for place, piece in pieces:
                found[place] += piece
        return found

    def cancel(self) -> None:
        for answer in self.each:
            answer.request.cancel()
