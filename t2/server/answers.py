"""Answers of the engine as they come: text, log-probabilities, and why they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from t2.generation.engine import Engine, Finished, QueueFull, Request, Sampling, Token
from t2.generation.prompts import encode
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


@dataclass
class Answer:
    """One answer, from the request on. `pieces` may be read once; leaving it early cancels the request.

    seconds: the longest that it may take.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    request: Request
    events: asyncio.Queue[Token | Finished]
    text: GrowingText
    seconds: float
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    made: int = 0
    finish: str | None = None

    @classmethod
    def begin(
        cls,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        chosen: Chosen,
        *,
        max_tokens: int,
        sampling: Sampling,
        stops: Sequence[str],
        likeliest: int | None,
        seconds: float,
    ) -> Answer:
        """Hands a request in.

        Raises:
            ApiError: 400 for a prompt that is too long, 404 for an expert that is gone, 429 where too many wait, 503
                where the engine has ended.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Token | Finished] = asyncio.Queue()

        def tell(event: Token | Finished) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

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
                prompt, tell, max_tokens=max_tokens, expert=chosen.choice, sampling=sampling, likeliest=likeliest
            )
        except QueueFull as error:
            raise ApiError(429, "the server is busy; try again later", code="queue_full") from error
        except ValueError as error:
            status = 404 if isinstance(chosen.choice, str) and chosen.choice not in engine.svf.bank else 400
            raise ApiError(status, str(error), "model" if status == 404 else "prompt") from error
        except RuntimeError as error:
            raise ApiError(503, "the engine has ended") from error
        return cls(engine, tokenizer, request, events, GrowingText(tokenizer, stops), seconds)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer, piece by piece.

        Raises:
            ApiError: 500 where the engine failed, 504 after the longest time.
        """
        try:
            held: list[Token] = []
            while self.finish is None:
                left = self.started + self.seconds - time.perf_counter()
                try:
                    event = await asyncio.wait_for(self.events.get(), max(left, 0.0))
                except TimeoutError as error:
                    raise ApiError(504, f"no whole answer in {self.seconds:g} s", code="timeout") from error
                if isinstance(event, Finished):
                    if event.reason == "error":
                        raise ApiError(500, f"the engine failed: {event.error}")
                    self.finish = event.reason
                    yield Piece(self.text.end(), tuple(held), self.finish)
                    return
                self.made += 1
                if self.first_token is None:
                    self.first_token = time.perf_counter() - self.started
                ends = event.id in self.engine.eos_ids
                held += [] if ends else [event]
                text = "" if ends else self.text.add(event.id)
                if self.text.stopped:
                    self.finish = "stop"
                    yield Piece(text, tuple(held), "stop")
                elif text:
                    yield Piece(text, tuple(held))
                    held = []
        finally:
            self.request.cancel()

    async def whole(self) -> Piece:
        """All of it in one piece."""
        text, tokens = "", list[Token]()
        async for piece in self.pieces():
            text, tokens = text + piece.text, tokens + list(piece.tokens)
        return Piece(text, tuple(tokens), self.finish)

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
