"""The HTTP side: routes, keys, limits, errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from t2.experts.expert import Expert
from t2.server.answers import Answer, Answers, Mail, Piece, chat_prompt
from t2.server.errors import ApiError
from t2.server.experts import SUFFIX, Chosen, Experts
from t2.server.metrics import Metrics
from t2.server.opened import Opened
from t2.server.schema import Body, ChatBody, CompletionBody, parsed
from t2kernels.files import replacing

log = logging.getLogger("t2.server")


@dataclass(frozen=True)
class ServerOptions:
    """Limits and keys of a server.

    api_keys: clients send one as "Authorization: Bearer KEY"; without any everybody may ask.
    admin_key: may add and remove experts; None: nobody may.
    max_body: bytes of a request.
    body_seconds, answer_seconds: the longest that a request may take to arrive, and its answer to be made.
    log_prompts: whether logs have the prompts.
    """

    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 600.0
    log_prompts: bool = False


class Server:
    """What the routes share. The bank's folder is watched while the server runs."""

    def __init__(self, opened: Opened, options: ServerOptions | None = None) -> None:
        self.tokenizer, self.engine = opened.tokenizer, opened.engine
        self.options = options or ServerOptions()
        self.experts = Experts(opened)
        self.experts.look()
        self.metrics = Metrics(opened.engine)
        self.mail: Mail | None = None
        """Of the loop that the application runs in."""
        self.created = int(time.time())

    # Requests

    async def body(self, request: Request, most: int | None = None) -> bytes:
        """The body, within the limits of size, `most` bytes in place of the option's, and of time."""
        most = self.options.max_body if most is None else most
        announced = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"body: expected at most {most} bytes", code="body_too_large")
        if not announced.isdigit() or int(announced) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.options.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError as error:
            raise ApiError(408, f"body: expected it whole within {self.options.body_seconds:g} s") from error
        return b"".join(parts)

    def check_key(self, request: Request, keys: Sequence[str]) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not any(hmac.compare_digest(given.encode(), key.encode()) for key in keys):
            raise ApiError(401, "expected a valid key as Authorization: Bearer KEY", code="invalid_api_key")

    def completion_prompts(self, body: CompletionBody) -> list[tuple[list[int], str]]:
        """Token ids of each prompt, and its words."""
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        if not given or len(given) > 128:
            raise ApiError(400, f"prompt: expected 1 to 128 prompts, got {len(given)}", "prompt")
        found = []
        for each in given:
            if isinstance(each, str):
                found.append(([int(token) for token in self.tokenizer(each)["input_ids"]], each))
            elif all(token < self.engine.vocabulary for token in each):
                found.append((list(each), str(self.tokenizer.decode(each))))
            else:
                raise ApiError(400, f"prompt: expected token ids below {self.engine.vocabulary}", "prompt")
        if any(not tokens for tokens, _ in found):
            raise ApiError(400, "prompt: expected at least one token, got none", "prompt")
        return found

    # Answers

    async def answer(self, request: Request, made: Reply) -> Response:
        """The whole reply, or its stream. A client that goes away cancels all of it."""
        if made.body.stream:
            events = made.events()
            first = await anext(events)  # what is refused is refused before the stream begins
            return StreamingResponse(_prepended(first, events), media_type="text/event-stream")
        whole = asyncio.ensure_future(made.whole())
        gone = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            whole.cancel()
            with suppress(asyncio.CancelledError):
                await whole
            raise ClientDisconnect
        gone.cancel()
        return JSONResponse(whole.result())

    def note(self, made: Reply, status: int, error: str | None = None) -> None:
        """Counts and logs a request that has ended."""
        expert = made.chosen[0].name if made.chosen else ""
        known = expert if expert in (*self.experts.names, "base", "") else "mix"
        tokens = sum(answer.made for answer in made.answers.each)
        self.metrics.requests.labels(known, status).inc()
        self.metrics.prompt_tokens.labels(known).inc(made.prompt_tokens)
        self.metrics.tokens.labels(known).inc(tokens)
        seconds = time.perf_counter() - made.started
        self.metrics.whole.observe(seconds)
        first = [answer.first_token for answer in made.answers.each if answer.first_token is not None]
        if first:
            self.metrics.first_token.observe(min(first))
        fields = {
            "id": made.id,
            "expert": expert,
            "status": status,
            "prompt_tokens": made.prompt_tokens,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "first_token": round(min(first), 4) if first else None,
        }
        if error is not None:
            fields["error"] = error
        if self.options.log_prompts:
            fields["words"] = made.words
        log.info("request", extra={"fields": fields})


class Reply:
    """The reply to one request: `n` answers to each of its prompts."""

    kind = ""

    def __init__(self, server: Server, body: Body) -> None:
        self.server, self.body = server, body
        self.id = f"{self.kind}-{uuid.uuid4().hex}"
        self.started = time.perf_counter()
        self.chosen: list[Chosen] = []
        assert server.mail is not None, "a request came before the application's start"
        self.answers = Answers(server.mail, server.engine, server.tokenizer, server.options.answer_seconds)
        self.words: list[str] = []
        self.prompt_tokens = 0

    async def begin(self) -> None:
        """Hands in all requests; those that were handed in are cancelled if one is refused."""
        raise NotImplementedError

    async def _begin(
        self, prompts: Sequence[tuple[Sequence[int], str]], max_tokens: int | None, likeliest: int | None
    ) -> None:
        self.words = [words for _, words in prompts]
        self.chosen = await asyncio.gather(*(self.server.experts.choose(self.body.model, w) for w in self.words))
        self.prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
        try:
            for (prompt, _), chosen in zip(prompts, self.chosen, strict=True):
                limit = max(1, self.server.engine.max_tokens - len(prompt)) if max_tokens is None else max_tokens
                for index in range(self.body.n):
                    self.answers.begin(
                        prompt,
                        chosen,
                        max_tokens=limit,
                        sampling=self.body.sampling(index),
                        stops=self.body.stops,
                        likeliest=likeliest,
                    )
        except BaseException:
            self.answers.cancel()
            raise

    def choice(self, index: int, answer: Answer, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, index: int, answer: Answer, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def about(self) -> dict[str, Any]:
        """Fields of every reply and of every event of a stream."""
        found = {"id": self.id, "created": int(time.time()), "model": self.body.model}
        experts: list[dict[str, Any]] = [{"expert": chosen.name} for chosen in self.chosen]
        for entry, chosen in zip(experts, self.chosen, strict=True):
            if chosen.reason is not None:
                entry |= {"reason": chosen.reason, "first_pass_seconds": chosen.seconds}
        return found | {"t2": experts[0] if len(experts) == 1 else {"prompts": experts}}

    @property
    def usage(self) -> dict[str, Any]:
        made = sum(answer.made for answer in self.answers.each)
        known = sum(answer.request.cached for answer in self.answers.each)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": known},
        }

    async def whole(self) -> dict[str, Any]:
        status, error = 200, None
        try:
            await self.begin()
            found = await self.answers.whole()
            choices = [
                self.choice(i, answer, piece)
                for i, (answer, piece) in enumerate(zip(self.answers.each, found, strict=True))
            ]
            return self.about | {"object": self.whole_object, "choices": choices, "usage": self.usage}
        except ApiError as refused:
            status, error = refused.status, str(refused)
            raise
        except asyncio.CancelledError:
            status = 499
            raise
        except Exception as failed:
            status, error = 500, str(failed)
            raise
        finally:
            self.answers.cancel()
            self.server.note(self, status, error)

    async def events(self) -> AsyncIterator[str]:
        """The reply as server-sent events. The first, which may be empty, comes when all requests were handed in."""
        status, error, begun = 200, None, False
        try:
            await self.begin()
            begun = True
            yield "".join(map(_event, self.openings()))
            async for pieces in self.answers.pieces():
                about = self.about | {"object": self.event_object}
                deltas = [self.delta(index, self.answers.each[index], piece) for index, piece in pieces]
                yield "".join(_event(about | {"choices": [delta]}) for delta in deltas)
            if self.body.with_usage:
                yield _event(self.about | {"object": self.event_object, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except ApiError as failed:
            status, error = failed.status, str(failed)
            if not begun:
                raise
            yield _event(failed.body)
        except (asyncio.CancelledError, GeneratorExit):
            status = 499
            raise
        except Exception as failed:
            status, error = 500, str(failed)
            if not begun:
                raise
            log.error("failure", exc_info=failed)
            yield _event(ApiError(500, "the server failed on this answer; its log says why").body)
        finally:
            self.answers.cancel()
            self.server.note(self, status, error)

    whole_object = event_object = ""

    def openings(self) -> list[dict[str, Any]]:
        """Events before the first token."""
        return []


class ChatReply(Reply):
    kind, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatBody

    async def begin(self) -> None:
        prompt = chat_prompt(self.server.tokenizer, [message.plain for message in self.body.messages])
        likeliest = (self.body.top_logprobs or 0) if self.body.logprobs else None
        await self._begin([prompt], self.body.limit, likeliest)

    def openings(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.about | {"object": self.event_object, "choices": [{"index": i, "delta": delta, "finish_reason": None}]}
            for i in range(len(self.answers.each))
        ]

    def choice(self, index: int, answer: Answer, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        log_p = answer.chat_log_p(piece.tokens) if self.body.logprobs else None
        return {"index": index, "message": message, "logprobs": log_p, "finish_reason": piece.finish}

    def delta(self, index: int, answer: Answer, piece: Piece) -> dict[str, Any]:
        log_p = answer.chat_log_p(piece.tokens) if self.body.logprobs else None
        return {"index": index, "delta": {"content": piece.text}, "logprobs": log_p, "finish_reason": piece.finish}


class CompletionReply(Reply):
    kind, whole_object, event_object = "cmpl", "text_completion", "text_completion"
    body: CompletionBody

    async def begin(self) -> None:
        await self._begin(self.server.completion_prompts(self.body), self.body.max_tokens, self.body.logprobs)

    def choice(self, index: int, answer: Answer, piece: Piece) -> dict[str, Any]:
        offset = answer.text.length - len(piece.text)
        log_p = None if self.body.logprobs is None else answer.completion_log_p(piece.tokens, offset)
        return {"index": index, "text": piece.text, "logprobs": log_p, "finish_reason": piece.finish}

    delta = choice


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _prepended(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        if first:
            yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Keys:
    """Lets requests through that have the key they need."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(Request(scope))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, request: Request) -> None:
        server, options = self._server, self._server.options
        if request.method in ("PUT", "DELETE"):
            if options.admin_key is None:
                raise ApiError(403, "experts: expected a server that was started with an admin key")
            server.check_key(request, [options.admin_key])
        elif request.url.path.startswith("/v1/") and options.api_keys:
            server.check_key(request, options.api_keys)


def make_app(server: Server) -> FastAPI:
    """The application. Whoever makes it lets the engine run (`Engine.alongside`)."""
    experts = server.experts

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.mail = Mail(server.engine)
        watching = asyncio.create_task(experts.watch())
        try:
            yield
        finally:
            watching.cancel()

    app = FastAPI(title="t2 serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Keys, server=server)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return PlainTextResponse("", 499)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("failure", exc_info=error)
        return ApiError(500, "the server failed on this request; its log says why").response()

    @app.get("/v1/models")
    async def models() -> Any:
        entries = [model_entry(name) for name in experts.names]
        return {"object": "list", "data": entries}

    def model_entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": server.created, "owned_by": "t2"}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name not in experts.names:
            await experts.choose(name, "")  # 404, unless it is a mix
        return model_entry(name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, ChatReply(server, parsed(ChatBody, await server.body(request))))

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await server.answer(request, CompletionReply(server, parsed(CompletionBody, await server.body(request))))

    @app.put("/v1/experts/{name}")
    async def put_expert(name: str, request: Request) -> Any:
        path = _expert_file(experts, name)
        content = await server.body(request, 8 * experts.svf.layout.R + server.options.max_body)

        def write() -> None:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
                expert = Expert.load(temporary)
                experts.svf.layout.check_same(expert.layout, name, same_base=True)
                experts.svf.slot_table.scales_of(expert.z)

        try:
            await asyncio.to_thread(write)
        except ValueError as error:
            raise ApiError(400, f"expert: {error}") from error
        await asyncio.to_thread(experts.look)
        return {"id": name, "object": "model"}

    @app.delete("/v1/experts/{name}")
    async def delete_expert(name: str) -> Any:
        path = _expert_file(experts, name)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise ApiError(404, f"expert: expected one that is there, got {name!r:.200}") from error
        await asyncio.to_thread(experts.look)
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health() -> Response:
        engine = server.engine
        good = engine.failure is None
        content = {"status": "ok" if good else "failed", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(content, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(resources.files("t2.server").joinpath("page.html").read_text())

    return app


def _expert_file(experts: Experts, name: str) -> Path:
    if experts.folder is None:
        raise ApiError(403, "experts: expected a server with a bank's folder")
    if experts.is_reserved(name):
        raise ApiError(400, f"expert: expected another name than the base's or of a choice, got {name!r}")
    if Path(name).name != name or name.startswith(".") or "\0" in name or len(name) > 128:
        raise ApiError(400, f"expert: expected a name that is a file name, got {name!r:.200}")
    return experts.folder / f"{name}{SUFFIX}"
