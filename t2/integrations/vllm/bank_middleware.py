"""Middleware of `vllm serve` for a bank: "auto" as a model, and files that are replaced or go.

    vllm serve MODEL ... --middleware t2.integrations.vllm.bank_middleware.BankMiddleware

vLLM keeps what a name meant when it was first asked for. Here the name is looked up again for each request, so that a
replaced file counts from the next request on; answers that run end with the expert that they began with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2.adaptation.bank_folder import CLASSIFIER, load_bank_folder
from t2.adaptation.dispatch import CONTENT_FREE
from t2.adaptation.labels import label_tokens
from t2.generation.prompts import encode
from t2.integrations.vllm.bank import Bank, lora_request
from t2.tasks.classify import OTHERS, adaptation_problem, labels_of
from t2kernels.files import strict_json

AUTO = "auto"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
MOST = 64 << 20
"""Largest body that is read, in bytes."""
Message = MutableMapping[str, Any]
log = logging.getLogger("vllm.t2")


class BankMiddleware:
    """Looks a request's model up in the bank, and chooses one for "auto".

    The answer to "auto" names the expert in its `model`, and in the header `x-t2-expert`; `x-t2-reason` has the
    probabilities, `x-t2-seconds` what the choice took.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.bank = Bank.from_environment()
        self._pass_one: PassOne | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self.app(scope, receive, send)
            return
        content = await _body(receive)
        if content is None:
            await _refuse(send, 413, f"body: expected at most {MOST} bytes")
            return
        try:
            body = strict_json(content)
            model = body.get("model") if isinstance(body, dict) else None
        except ValueError:
            body = model = None  # vLLM says what is wrong with it
        state = scope["app"].state
        if isinstance(model, str) and model == AUTO:
            if not await self._may_ask(scope, send):
                return
            try:
                name, reason, seconds = await self._choose(body, state)
            except (OSError, ValueError) as error:
                await _refuse(send, 400, f"model: no automatic choice: {error}")
                return
            served = state.openai_serving_models
            body["model"] = model = served.base_model_paths[0].name if name == OTHERS else name
            content = json.dumps(body).encode()
            headers = {"x-t2-expert": name, "x-t2-reason": reason, "x-t2-seconds": f"{seconds:.3f}"}
            send = _with_headers(send, headers)
        if isinstance(model, str) and not await self._served(model, state.openai_serving_models, scope, send):
            return
        await self.app(_resized(scope, len(content)), _replay(content, receive), send)

    async def _served(self, name: str, served: Any, scope: Any, send: Any) -> bool:
        """Lets vLLM load what the bank has for a name now, where it has something else, or nothing yet.

        Returns whether the request may go on; its refusal is sent where it may not.
        """
        if served.is_base_model(name):
            return True
        known = served.lora_requests.get(name)
        try:
            found = await asyncio.to_thread(self.bank.find, name)
        except (OSError, ValueError, TypeError) as error:
            log.error("expert %r refused: %s", name, error)
            if known is None:
                await _refuse(send, 400, f"model: {name!r:.200} cannot be used: {error}")
            return known is not None  # it stays as it was
        if found is None:
            served.lora_requests.pop(name, None)
        elif known is None or str(found.path) != known.lora_path:
            if not await self._may_ask(scope, send):
                return False
            served.lora_requests.pop(name, None)
            loaded = await served.resolve_lora(name)
            if hasattr(loaded, "error"):
                await _refuse(send, 400, f"model: {name!r:.200} cannot be used: {loaded.error.message}")
                return False
        return True

    async def _may_ask(self, scope: Any, send: Any) -> bool:
        """True if vLLM answers this client at all; else its refusal is sent."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        asked = {**scope, "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models", "query_string": b""}
        await self.app(_resized(asked, 0), _replay(b"", None), keep)
        if messages and messages[0]["status"] == 200:
            return True
        for message in messages:
            await send(message)
        return False

    async def _choose(self, body: Mapping[str, Any], state: Any) -> tuple[str, str, float]:
        started = time.perf_counter()
        words = _words(body)
        if self._pass_one is None or not self._pass_one.is_current():
            tokenizer = state.engine_client.get_tokenizer()
            if asyncio.iscoroutine(tokenizer):
                tokenizer = await tokenizer
            self._pass_one = await asyncio.to_thread(PassOne, self.bank, tokenizer)
        name, reason = await self._pass_one.choose(words, state.engine_client)
        return name, reason, time.perf_counter() - started


class PassOne:
    """The choice of an expert by the likeliest label: with the classification expert if the bank has one.

    The scores, and their calibration without a classification expert, are those of
    `t2.adaptation.dispatch.PromptStrategy`.
    """

    def __init__(self, bank: Bank, tokenizer: Any) -> None:
        self.bank, self.tokenizer = bank, tokenizer
        self._stamp = self._read()
        folder = load_bank_folder(bank.folder)
        self.domains, self.labels = folder.domains, labels_of(folder.domains)
        self.tokens = label_tokens(self.labels, tokenizer)
        self.classifier = CLASSIFIER if folder.classifier is not None else None
        self.prior: Tensor | None = torch.zeros(len(self.labels)) if self.classifier else None

    def _read(self) -> tuple[tuple[str, int, int], ...]:
        files = sorted(self.bank.folder.glob("*.safetensors"))
        files.append(self.bank.folder / "domains.json")
        return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())

    def is_current(self) -> bool:
        """True while no file of the folder has changed."""
        return self._read() == self._stamp

    async def choose(self, words: str, client: Any) -> tuple[str, str]:
        """The label of a prompt, and all labels' probabilities in words."""
        if self.prior is None:
            scores = torch.stack([await self.scores(each, client) for each in CONTENT_FREE])
            self.prior = scores.logsumexp(0) - torch.tensor(float(len(scores))).log()
        probabilities = torch.softmax(await self.scores(words, client) - self.prior, dim=-1).tolist()
        ranked = sorted(zip(probabilities, self.labels, strict=True), reverse=True)
        return ranked[0][1], ", ".join(f"{label} {probability:.0%}" for probability, label in ranked)

    async def scores(self, words: str, client: Any) -> Tensor:
        """log p(label | prompt) [labels], by the tokens that tell the labels apart."""
        prompt = encode(adaptation_problem(words, self.domains), self.tokenizer).tolist()
        steps = {
            ids[:t]: permitted[t]
            for ids, permitted in zip(self.tokens.tokens, self.tokens.permitted, strict=True)
            for t in range(len(ids))
            if len(permitted[t]) > 1
        }
        found = await asyncio.gather(*(self._next(client, [*prompt, *ids], allowed) for ids, allowed in steps.items()))
        by_step = dict(zip(steps, found, strict=True))
        return torch.tensor(
            [sum(by_step[ids[:t]][ids[t]] for t in range(len(ids)) if ids[:t] in by_step) for ids in self.tokens.tokens]
        )

    async def _next(self, client: Any, prompt: list[int], allowed: Sequence[int]) -> dict[int, float]:
        """log p of each of these tokens among them, after a prompt."""
        from vllm import SamplingParams

        options = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=list(allowed), detokenize=False)
        expert = None if self.classifier is None else await asyncio.to_thread(lora_request, self.classifier, self.bank)
        outputs = client.generate({"prompt_token_ids": prompt}, options, f"t2-auto-{uuid.uuid4()}", lora_request=expert)
        given = [output.outputs[0].logprobs[0] async for output in outputs][-1]
        scores = torch.tensor([given[token].logprob for token in allowed]).log_softmax(0).tolist()
        return dict(zip(allowed, scores, strict=True))


def _words(body: Mapping[str, Any]) -> str:
    """The user's last words, or the prompt.

    Raises:
        ValueError: there are none.
    """
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        for message in reversed(messages):
            if isinstance(message, dict) and message.get("role") == "user":
                return _text(message.get("content"))
    for given in (messages, body.get("prompt")):
        if isinstance(given, str):
            return given
    raise ValueError("expected a user's message or a prompt as text, got none")


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    raise ValueError(f"expected a message of text, got {type(content).__name__}")


async def _body(receive: Callable[[], Awaitable[Message]]) -> bytes | None:
    """All of a request's body; None where it is too large. A client that goes away leaves what came."""
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return b"".join(parts)


def _replay(content: bytes, receive: Callable[[], Awaitable[Message]] | None) -> Callable[[], Awaitable[Message]]:
    """A body that has been read already, and then what the client does."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": content, "more_body": False}
        return {"type": "http.disconnect"} if receive is None else await receive()

    return again


def _resized(scope: Any, length: int) -> Any:
    headers = [pair for pair in scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _with_headers(send: Any, headers: Mapping[str, str]) -> Any:
    added = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return with_headers


async def _refuse(send: Any, status: int, words: str) -> None:
    error = {"message": words, "type": "BadRequestError", "param": "model", "code": status}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
