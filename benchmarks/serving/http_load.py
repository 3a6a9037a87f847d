"""`t2 serve` under load: many clients, an expert each, some that go away, experts that are replaced meanwhile.

    python -m benchmarks.serving.http_load [--requests 2000] [--clients 200]

SmolLM2-135M-Instruct with bfloat16 factors and products, greedy. Requests name one of 32 experts, mixes of two, the
base or auto; lengths are 4 to 400 tokens, as many short as long ones by their logarithm; a tenth of the clients goes
away in the middle. One expert is replaced every second, its answers may be either version's. A sample of the answers is
compared with those of `svf.generate` alone. Then the same requests run on the engine without HTTP. Clients run on the
same cores. Writes benchmarks/results/http-load.json.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import torch
import tyro
from tqdm import tqdm
from tqdm.asyncio import tqdm as tqdm_async

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from t2.adaptation.bank_folder import SHIPPED
from t2.demo.run import QUESTIONS
from t2.generation.compiled_pass import Compilation
from t2.generation.engine import Engine, Finished, Request, Token
from t2.generation.prompts import encode, eos_ids_of
from t2.tasks.base import Problem, user_message
from t2.weights.machine import machine

MODEL = "smollm2-135m-instruct"
ROWS, MOST, EXPERTS = 32, 640, 32
SWAPPED = "swapped"


@dataclass(frozen=True)
class Asked:
    """A request: what it names, its words, its length, and after how many pieces its client goes away."""

    model: str
    words: str
    tokens: int
    leaves: int | None


def requests_of(count: int, names: Sequence[str], seed: int) -> list[Asked]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        kind = draw.random()
        one, two = draw.sample(list(names), 2)
        model = f"{one}:0.5+{two}:0.5" if kind < 0.1 else "auto" if kind < 0.2 else "base" if kind < 0.3 else one
        model = SWAPPED if 0.3 <= kind < 0.35 else model
        tokens = round(math.exp(draw.uniform(math.log(4), math.log(400))))
        leaves = draw.randrange(1, 10) if draw.random() < 0.1 else None
        found.append(Asked(model, draw.choice(QUESTIONS), tokens, leaves))
    return found


def bank_of(folder: Path, svf: t2.SVFModel) -> tuple[list[str], list[bytes]]:
    """Fills a folder; returns the names of its experts and both versions of the one that is replaced."""
    shutil.copytree(SHIPPED / MODEL, folder)
    names = [path.stem for path in folder.glob("*.safetensors") if path.stem != "classifier"]
    for i in range(EXPERTS - len(names)):
        names.append(f"random-{i}")
        t2.Expert.random(svf.layout, std=0.03, seed=i).save(folder / f"random-{i}.safetensors")
    versions = []
    for seed in (1000, 1001):
        t2.Expert.random(svf.layout, std=0.05, seed=seed).save(folder / f"{SWAPPED}.safetensors")
        versions.append((folder / f"{SWAPPED}.safetensors").read_bytes())
    return names, versions


def memory_of(process: int) -> int:
    """Resident bytes."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def ask(session: aiohttp.ClientSession, asked: Asked) -> dict[str, Any]:
    body = {
        "model": asked.model,
        "messages": [{"role": "user", "content": asked.words}],
        "max_tokens": asked.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first, text, usage, expert, pieces, ended = None, "", None, None, 0, False
    async with session.post("/v1/chat/completions", json=body) as response:
        if response.status != 200:
            return {"error": f"{response.status}: {await response.text()}"}
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                ended = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return {"error": str(event["error"])}
            expert, usage = event["t2"]["expert"], event.get("usage") or usage
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                first = time.perf_counter() - started if first is None else first
                text += piece
                pieces += 1
            if asked.leaves is not None and pieces >= asked.leaves:
                return {"left": True}  # the connection is closed, not all of it was read
    if usage is None or not ended:
        return {"error": "the stream ended before its end"}
    made = usage["completion_tokens"]
    return {"text": text, "first": first, "tokens": made, "expert": expert, "seconds": time.perf_counter() - started}


async def load(
    url: str, asked: Sequence[Asked], clients: int, look: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """What every request found; `look` is called before the first, after each quarter of them, and after the last."""
    looks, ended = [round(len(asked) * quarter / 4) for quarter in range(5)], 0
    room = asyncio.Semaphore(clients)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def one(each: Asked) -> dict[str, Any]:
            nonlocal ended
            async with room:
                if not ended and looks[0] == 0:
                    look()
                    looks.pop(0)
                try:
                    return await ask(session, each)
                except aiohttp.ClientError as error:
                    return {"error": f"{type(error).__name__}: {error}"}
                finally:
                    ended += 1
                    if looks and ended >= looks[0]:
                        look()
                        looks.pop(0)

        return list(await tqdm_async.gather(*map(one, asked), desc="requests", mininterval=5))


async def first_answer(url: str) -> None:
    """Asks until there is an answer: the server says where it listens a moment before it does."""
    async with aiohttp.ClientSession(url) as session:
        while True:
            try:
                found = await ask(session, Asked("base", QUESTIONS[0], 1, None))
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.02)
                continue
            if "error" in found:
                raise RuntimeError(found["error"])
            return


def served(folder: Path, asked: Sequence[Asked], clients: int, versions: Sequence[bytes]) -> dict[str, Any]:
    """Results of all requests, and the server's memory as requests end, and the seconds that its start took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t2", "serve", MODEL, "--bank", str(folder), "--port", str(port)]
    command += ["--max-rows", str(ROWS), "--max-tokens", str(MOST), "--max-waiting", "100000"]
    with tempfile.TemporaryFile() as log:
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(log, process, b"answering on")
            asyncio.run(first_answer(url))
            answered = time.perf_counter() - begun
            wait_for(log, process, b"passes run compiled")
            compiled = time.perf_counter() - begun
            ended, swaps = threading.Event(), 0

            def swap() -> None:
                nonlocal swaps
                while not ended.wait(1.0):
                    swaps += 1
                    temporary = folder / "new.tmp"
                    temporary.write_bytes(versions[swaps % 2])
                    os.replace(temporary, folder / f"{SWAPPED}.safetensors")

            swapping = threading.Thread(target=swap)
            swapping.start()
            memory, started, worked = list[int](), time.perf_counter(), time.process_time()
            try:
                results = asyncio.run(load(url, asked, clients, lambda: memory.append(memory_of(process.pid))))
            finally:
                ended.set()
                swapping.join()
            return {
                "results": results,
                "seconds": time.perf_counter() - started,
                "client_seconds": time.process_time() - worked,
                "memory": memory,
                "swaps": swaps,
                "first_answer_seconds": answered,
                "compiled_seconds": compiled,
            }
        finally:
            process.terminate()
            process.wait(60)


def wait_for(log: IO[bytes], process: subprocess.Popen[bytes], line: bytes) -> None:
    """Until the server has written a line. RuntimeError if it ends before."""
    while line not in os.pread(log.fileno(), 1 << 20, 0):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        time.sleep(0.1)


def compiled_engine(svf: t2.SVFModel, tokenizer: Any) -> Engine:
    """An engine like the server's, when its passes run compiled."""
    engine = Engine(svf, eos_ids=eos_ids_of(svf.model, tokenizer), max_rows=ROWS, max_tokens=MOST, max_waiting=10**6)
    with Compilation(engine, tqdm.write) as compilation:
        compilation.finish()
    return engine


def engine_alone(svf: t2.SVFModel, tokenizer: Any, asked: Sequence[Asked], experts: Sequence[str]) -> float:
    """Tokens a second of the answers that no client leaves, of the same requests without HTTP and pass one."""
    engine = compiled_engine(svf, tokenizer)
    left, made = len(asked), [0] * len(asked)
    given: list[Request] = []

    def event(place: int, found: Token | Finished) -> None:
        nonlocal left
        left -= isinstance(found, Finished)
        made[place] += isinstance(found, Token)
        if made[place] == asked[place].leaves:
            given[place].cancel()

    for each, expert in zip(asked, experts, strict=True):
        prompt = encode(Problem((user_message(each.words),)), tokenizer).tolist()
        choice: Any = None if expert == "base" else expert
        if ":" in expert:
            choice = {part.partition(":")[0]: float(part.partition(":")[2]) for part in expert.split("+")}
        heard = functools.partial(event, len(given))
        given.append(engine.submit(prompt, heard, max_tokens=each.tokens, expert=choice))
    started = time.perf_counter()
    with tqdm(total=len(asked), desc="engine alone") as bar:
        while engine.step():
            bar.update(len(asked) - left - bar.n)
    assert left == 0
    seconds = time.perf_counter() - started
    return sum(count for count, each in zip(made, asked, strict=True) if each.leaves is None) / seconds


def alone(svf: t2.SVFModel, tokenizer: Any, asked: Asked, expert: Any) -> str:
    prompt = encode(Problem((user_message(asked.words),)), tokenizer)[None]
    out = svf.generate(prompt, experts=[expert], max_new_tokens=asked.tokens, do_sample=False)
    return str(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))


def load_table(results: Any) -> Table:
    """What clients saw."""
    first, machine_ = results["first_token_seconds"], results["machine"]
    rows = [
        ["answered, left by their client, lost", f"{results['answered']:,}, {results['left']:,}, {results['lost']:,}"],
        ["the answer of `generate` alone", f"{results['same']} of {results['checked']}"],
        ["tokens/s", f"{results['tokens_per_second']:.0f}"],
        ["the engine without HTTP, pass one and clients", f"{results['engine_tokens_per_second']:.0f}"],
        ["the clients' own share of the processor", f"{results['client_share']:.0%}"],
        ["time to the first token, p50 and p99", f"{first['p50']:.1f} s, {first['p99']:.1f} s"],
        [
            "memory before, after each quarter of the requests",
            ", ".join(f"{value / 1e6:,.0f} MB" for value in results["memory"]),
        ],
        ["replacements of an expert meanwhile", str(results["swaps"])],
        ["from the start to the first answer", f"{results['first_answer_seconds']:.1f} s"],
        ["from the start to compiled passes, kept from an earlier start", f"{results['compiled_seconds']:.1f} s"],
    ]
    return Table(
        f"{results['requests']:,} requests of {results['clients']} clients, {ROWS} in the batch, "
        f"{machine_['threads']} cores of {machine_['processor']} (`python -m benchmarks.serving.http_load`):",
        ["", ""],
        rows,
    )


def main(requests: int = 2000, clients: int = 200, check: int = 60, results: Path = RESULTS / "http-load.json") -> None:
    """Args:
    requests: Number of requests.
    clients: Requests that are open at a time.
    check: Answers to compare with `generate`.
    results: File for the results as JSON.
    """
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False))
    with tempfile.TemporaryDirectory() as parent:
        compiled_engine(svf, tokenizer)  # the server finds the program
        folder = Path(parent) / "bank"
        names, versions = bank_of(folder, svf)
        asked = requests_of(requests, names, 0)
        found = served(folder, asked, clients, versions)
        for path in folder.glob("*.safetensors"):
            svf.add_expert(path.stem, t2.Expert.load(path))
        swapped = []
        for content in versions:
            (folder / "version.safetensors").write_bytes(content)
            swapped.append(t2.Expert.load(folder / "version.safetensors"))
    whole = [(each, got) for each, got in zip(asked, found["results"], strict=True) if "text" in got]
    sample = random.Random(1).sample(whole, min(check, len(whole)))
    same = 0
    for each, got in tqdm(sample, desc="alone"):
        expert = got["expert"] if each.model == "auto" else each.model
        choices: list[Any] = swapped if expert == SWAPPED else [None if expert == "base" else expert]
        if ":" in expert:
            choices = [{part.partition(":")[0]: float(part.partition(":")[2]) for part in expert.split("+")}]
        same += any(alone(svf, tokenizer, each, choice) == got["text"] for choice in choices)
    first = sorted(got["first"] for _, got in whole if got["first"] is not None)
    tokens = sum(got["tokens"] or 0 for _, got in whole)
    experts = [
        got.get("expert", "base") if each.model == "auto" else each.model
        for each, got in zip(asked, found["results"], strict=True)
    ]
    write_results(
        results,
        {
            "machine": machine(),
            "requests": requests,
            "clients": clients,
            "answered": len(whole),
            "left": sum("left" in got for got in found["results"]),
            "lost": sum("error" in got for got in found["results"]),
            "errors": sorted({got["error"] for got in found["results"] if "error" in got})[:5],
            "checked": len(sample),
            "same": same,
            "tokens_per_second": tokens / found["seconds"],
            "client_share": found["client_seconds"] / found["seconds"] / torch.get_num_threads(),
            "engine_tokens_per_second": engine_alone(svf, tokenizer, asked, experts),
            "first_token_seconds": {"p50": statistics.median(first), "p99": first[int(0.99 * len(first))]},
            **{name: found[name] for name in ("memory", "swaps", "first_answer_seconds", "compiled_seconds")},
        },
    )
    load_table(json.loads(results.read_text())).show()


if __name__ == "__main__":
    tyro.cli(main)
