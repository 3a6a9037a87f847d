"""Two replicas of `t2 serve` behind Ray Serve, one of which is killed while they answer.

    python -m benchmarks.serving.ray_replicas [--requests 500]

SmolLM2-135M-Instruct with its shipped bank, bfloat16, greedy: the base and its experts, 16 requests open at a time.
After a third of the answers one replica gets SIGKILL. All answers are compared with those of `svf.generate` alone.
Writes benchmarks/results/ray-replicas.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import torch
import tyro
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, ROOT, Table, write_results
from benchmarks.serving.http_load import Asked, alone, ask, wait_for
from t2.adaptation.bank_folder import load_bank_folder
from t2.demo.run import QUESTIONS
from t2.weights.machine import machine

MODEL, REPLICAS, OPEN = "smollm2-135m-instruct", 2, 16


def replica_processes() -> list[int]:
    """The processes that hold replicas."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{name}/cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(name))
        except OSError:
            continue
    return found


async def run(url: str, asked: list[Asked]) -> dict[str, Any]:
    """Every request's result with the second it ended at, and when a replica was killed and two were there again."""
    room, started = asyncio.Semaphore(OPEN), time.perf_counter()
    about: dict[str, Any] = {}
    results: list[Any] = [None] * len(asked)
    ended = 0
    bar = tqdm(total=len(asked), desc="requests", mininterval=5)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def one(place: int) -> None:
            nonlocal ended
            async with room:
                try:
                    results[place] = await ask(session, asked[place])
                except aiohttp.ClientError as error:
                    results[place] = {"error": f"{type(error).__name__}: {error}"}
            results[place]["ended"] = time.perf_counter() - started
            ended += 1
            bar.update()

        async def kill() -> None:
            while ended < len(asked) // 3:
                await asyncio.sleep(0.05)
            before = replica_processes()
            os.kill(before[0], signal.SIGKILL)
            about["killed"] = time.perf_counter() - started
            while len(set(replica_processes()) - {before[0]}) < REPLICAS:
                await asyncio.sleep(0.1)
            about["process_again"] = time.perf_counter() - started

        await asyncio.gather(kill(), *map(one, range(len(asked))))
    bar.close()
    return {"results": results, **about}


def replicas_table(results: Any) -> Table:
    """Answers, failures and recovery."""
    rows = [
        ["answered, failed", f"{results['answered']}, {results['failed']}"],
        ["requests open at the killed replica or on their way to it, at most", str(OPEN)],
        ["the answer of `generate` alone", f"{results['same']} of {results['answered']}"],
        ["last failure after the kill", f"{results['last_failure_seconds']:.1f} s"],
        ["a new replica's process after the kill", f"{results['process_seconds']:.1f} s"],
        ["tokens/s, the kill included", f"{results['tokens_per_second']:.0f}"],
    ]
    return Table(
        f"{REPLICAS} replicas, {results['requests']} requests, one replica killed (-9) among them, "
        f"{results['machine']['threads']} cores of {results['machine']['processor']} "
        "(`python -m benchmarks.serving.ray_replicas`):",
        ["", ""],
        rows,
    )


def main(requests: int = 500, new_tokens: int = 16, results: Path = RESULTS / "ray-replicas.json") -> None:
    """Args:
    requests: Number of requests.
    new_tokens: Of each answer.
    results: File for the results as JSON.
    """
    bank = load_bank_folder(MODEL)
    names = ["base", *(domain.name for domain in bank.domains)]
    draw = random.Random(0)
    asked = [Asked(draw.choice(names), draw.choice(QUESTIONS), new_tokens, None) for _ in range(requests)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "t2", "serve", MODEL, "--bank", MODEL, "--port", str(port)]
    command += ["--engine", "ray", "--replicas", str(REPLICAS), "--no-compiled"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            wait_for(log, process, b"answering on")
            started = time.perf_counter()
            found = asyncio.run(run(f"http://127.0.0.1:{port}", asked))
            seconds = time.perf_counter() - started
        finally:
            process.terminate()
            process.wait(120)
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False))
    bank.add_to(svf)
    known: dict[tuple[str, str], str] = {}
    same = 0
    whole = [(each, got) for each, got in zip(asked, found["results"], strict=True) if "text" in got]
    for each, got in tqdm(whole, desc="alone", mininterval=5):
        key = each.model, each.words
        if key not in known:
            known[key] = alone(svf, tokenizer, each, None if each.model == "base" else each.model)
        same += known[key] == got["text"]
    failures = [got for got in found["results"] if "error" in got]
    content = {
        "machine": machine(),
        "requests": requests,
        "answered": len(whole),
        "failed": len(failures),
        "errors": sorted({got["error"][:200] for got in failures}),
        "same": same,
        "last_failure_seconds": max((got["ended"] for got in failures), default=found["killed"]) - found["killed"],
        "process_seconds": found["process_again"] - found["killed"],
        "tokens_per_second": sum(got["tokens"] for _, got in whole) / seconds,
    }
    write_results(results, content)
    replicas_table(json.loads(results.read_text())).show()


if __name__ == "__main__":
    tyro.cli(main)
