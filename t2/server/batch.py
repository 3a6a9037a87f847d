"""`t2 generate --input`: a file of requests, answered into another one, with which an interrupted run goes on."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from pydantic import Field, model_validator
from rich.console import Console
from tqdm import tqdm

from t2.generation.compiled_pass import Compilation
from t2.generation.sampling import Sampling
from t2.server.answers import Answers, Mail, chat_prompt
from t2.server.errors import ApiError
from t2.server.experts import Experts
from t2.server.opened import Opened
from t2.server.schema import Body, Message, parsed
from t2.weights.files import FileFormatError, parse_json

GREEDY = Sampling()


class Line(Body):
    """A request: a prompt, which is a user's message, or messages; `model` as in requests to a server."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    model: str = Field("base", min_length=1, max_length=512)
    temperature: float = Field(0.0, ge=0, le=2, strict=False)
    n: int = Field(1, ge=1, le=1)
    stream: bool = False
    max_tokens: int | None = Field(None, ge=1)
    id: str | int | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: expected it or messages, got both or neither")
        return self

    @property
    def said(self) -> list[dict[str, str]]:
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.plain for message in self.messages]


def read_lines(path: Path, sampling: Sampling = GREEDY) -> list[tuple[str, Line]]:
    """Every request with a hash of its line. Raises FileFormatError, which names the first line that is none.

    sampling: of the lines that do not say.
    """
    defaults = {name: value for name, value in asdict(sampling).items() if value is not None}
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = parsed(Line, text)
            missing = {name: value for name, value in defaults.items() if name not in line.model_fields_set}
            found.append((xxhash.xxh3_64_hexdigest(text), line.model_copy(update=missing)))
        except ApiError as error:
            raise FileFormatError(f"{path}, line {number}: {error}") from error
    if not found:
        raise FileFormatError(f"{path}: expected a request a line, got none")
    return found


def answered(path: Path, lines: Sequence[tuple[str, Line]]) -> set[int]:
    """The places of the requests that an output has answers to. A last line that was cut short is taken away.

    Raises:
        FileFormatError: it has answers to other requests.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    places: set[int] = set()
    for number, text in enumerate(content[:whole].splitlines(), 1):
        entry = parse_json(text, f"{path}, line {number}")
        place = entry.get("index") if isinstance(entry, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(lines) or entry.get("input") != lines[place][0]:
            raise FileFormatError(f"{path}, line {number}: expected an answer to a request of this input, got another")
        places.add(place)
    return places


def answer_file(
    opened: Opened, lines: Sequence[tuple[str, Line]], output: Path, *, max_tokens: int, console: Console
) -> bool:
    """Answers every request (`read_lines`) that `output` has no answer to; False if it was interrupted.

    Answers are written as they come, each with the index of its request. An answer that can't be made is a line with
    "error".
    """
    done = answered(output, lines)
    if done:
        console.print(f"{len(done)} of {len(lines)} are answered in {output}")
    experts = Experts(opened)
    experts.look()
    try:
        with Compilation(opened.engine, console.print):
            opened.engine.alongside(_answer_all(experts, lines, done, output, max_tokens, console))
    except KeyboardInterrupt:
        console.print(f"Interrupted. The same command goes on with {output}.")
        return False
    finally:
        opened.engine.close()
    return True


async def _answer_all(
    experts: Experts, lines: Sequence[tuple[str, Line]], done: set[int], output: Path, max_tokens: int, console: Console
) -> None:
    mail = Mail(experts.engine)
    room = asyncio.Semaphore(2 * experts.engine.max_rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    every = 0.1 if console.is_terminal else 10.0
    with output.open("ab") as file, tqdm(total=len(lines), initial=len(done), unit="line", mininterval=every) as bar:

        async def one(index: int, digest: str, line: Line) -> None:
            try:
                answer = await answer_line(experts, mail, line, max_tokens)
            finally:
                room.release()
            entry = {"index": index, "input": digest} | ({} if line.id is None else {"id": line.id}) | answer
            file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            bar.update()

        async with asyncio.TaskGroup() as tasks:
            for index, (digest, line) in enumerate(lines):
                if index not in done:
                    await room.acquire()
                    tasks.create_task(one(index, digest, line))
        os.fsync(file.fileno())


async def answer_line(experts: Experts, mail: Mail, line: Line, max_tokens: int) -> dict[str, Any]:
    """Text, expert and more of a request's answer; or its error, where the request is to blame."""
    try:
        prompt, words = chat_prompt(experts.tokenizer, line.said)
        chosen = await experts.choose(line.model, words)
        answers = Answers(mail, experts.engine, experts.tokenizer, float("inf"))
        most = line.max_tokens or max_tokens
        answer = answers.begin(prompt, chosen, max_tokens=most, sampling=line.sampling(0), stops=line.stops)
        (piece,) = await answers.whole()
    except ApiError as error:
        if error.status >= 500:
            raise
        return error.body
    about = {"expert": chosen.name} | ({} if chosen.reason is None else {"reason": chosen.reason})
    return {"text": piece.text, "finish_reason": piece.finish, "tokens": answer.made} | about
