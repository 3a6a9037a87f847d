"""The engine, an expert for every request, beside llama.cpp and vLLM without any, in turns.

    python -m benchmarks.serving.engine_peers --llama-python PATH [--vllm-python PATH]

The paths are Pythons of environments in which `pip install llama-cpp-python` and vLLM's CPU build were installed.
SmolLM2-135M-Instruct: llama.cpp runs the GGUF file of 4 bits that this package reads its weights from, and the same
rewritten in 8 bits; vLLM the same weights as bfloat16. Prompts of 40 tokens, greedy, no end token. Processes whose turn
it is not are stopped. Writes benchmarks/results/engine-peers.json.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from t2.generation.compiled_pass import Compilation
from t2.generation.engine import Engine, Finished, Token
from t2.weights.loading import ALIASES, alias_file
from t2.weights.machine import machine
from t2kernels.packing import INT4

MODEL, SUPPORT, PROMPT = "smollm2-135m-instruct", 64, 40
FORMS: dict[str, dict[str, Any]] = {
    "ours, int4, support of 64": {"dtype": INT4, "form": "delta", "support": SUPPORT},
    "ours, uint8, support of 64": {"dtype": torch.uint8, "form": "delta", "support": SUPPORT},
    "ours, int8, support of 64": {"dtype": torch.int8, "form": "delta", "support": SUPPORT},
    "ours, bfloat16, support of 64": {"dtype": torch.bfloat16, "form": "delta", "support": SUPPORT},
    "ours, bfloat16 factors": {"dtype": torch.bfloat16},
}
BATCHES = (1, 32)
LLAMA, VLLM = "llama.cpp, Q4_1, no experts", "vLLM, bfloat16, no experts"
LLAMA_8 = "llama.cpp, Q8_0, no experts"


class Worker:
    """A peer in a process of its own."""

    def __init__(
        self, python: Path, script: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        command = [str(python), str(Path(__file__).with_name(script)), *arguments]
        own = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which can be stopped
        }
        own |= environment or {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 — as long as the process
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, env=own, start_new_session=True, **pipes)
        self.about = self._read()
        os.killpg(self._process.pid, signal.SIGSTOP)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines() or [""]
        raise RuntimeError(f"{self._process.args!r} ended with exit code {self._process.wait()}: {lines[-1]}")

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
        return self.ask(prompts=prompts, new_tokens=new_tokens)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer; it runs no longer than that takes."""
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        found = self._read()
        os.killpg(self._process.pid, signal.SIGSTOP)
        return found

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


def llama_workers(python: Path, folder: Path) -> dict[str, Worker]:
    """llama.cpp with the file of 4 bits that this package reads its weights from, and with that rewritten in 8 bits."""
    given = (str(alias_file(ALIASES[MODEL])), str(torch.get_num_threads()))
    return {
        LLAMA: Worker(python, "llama_cpp_worker.py", *given),
        LLAMA_8: Worker(python, "llama_cpp_worker.py", *given, str(folder / "q8_0.gguf")),
    }


class Ours:
    """An engine in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        model, _ = t2.load(MODEL, dtype=torch.bfloat16)
        self.svf = t2.SVFModel(model, t2.SVFConfig(bf16_products=True, progress=False, slots=40, **options))
        table = self.svf.slot_table
        for i in range(max(BATCHES)):
            noise = torch.randn(len(table.column_sigma), generator=torch.Generator().manual_seed(i))
            self.svf.add_expert(f"e{i}", t2.Expert(table.with_columns(1 + 0.02 * noise), self.svf.layout))
        self.engine = Engine(self.svf, eos_ids=(), max_rows=max(BATCHES), max_tokens=512, chunk=1024, prefix_bytes=0)
        news: list[str] = []
        with Compilation(self.engine, news.append) as compilation:
            compilation.finish()
        if self.engine.compiled is None:
            raise RuntimeError(news[0])

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
        first = [0.0] * len(prompts)
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):

            def event(found: Token | Finished, i: int = i) -> None:
                first[i] = first[i] or time.perf_counter()

            self.engine.submit(prompt, event, max_tokens=new_tokens, expert=f"e{i}")
        while self.engine.step():
            pass
        return {"seconds": time.perf_counter() - start, "prompt_seconds": max(first) - start}


def tokens_a_second(path: dict[str, list[float]], rows: int, new_tokens: int) -> list[float]:
    """Of each turn's answers, without their first tokens, which come with the prompts."""
    pairs = zip(path["seconds"], path["prompt_seconds"], strict=True)
    return [rows * (new_tokens - 1) / (whole - prompts) for whole, prompts in pairs]


def peers_table(results: Any) -> Table:
    """Tokens a second of everyone, and our ratio to each peer."""
    rows, new_tokens = [], results["new_tokens"]
    for count, paths in results["requests"].items():
        speeds = {name: tokens_a_second(path, int(count), new_tokens) for name, path in paths.items()}
        for name, speed in speeds.items():
            ratios = [
                f"{statistics.median(a / b for a, b in zip(speed, speeds[peer], strict=True)):.2f}"
                if peer in speeds
                else ""
                for peer in (LLAMA, VLLM)
            ]
            prompts = statistics.median(paths[name]["prompt_seconds"])
            rows.append([name, count, f"{statistics.median(speed):.0f}", *ratios, f"{prompts:.2f}"])
    machine_ = results["machine"]
    return Table(
        f"SmolLM2-135M-Instruct, {results['new_tokens']} greedy tokens behind {PROMPT}, {machine_['threads']} cores of "
        f"{machine_['processor']}, all in turns, medians of {results['rounds']} "
        "(`python -m benchmarks.serving.engine_peers`):",
        ["engine", "requests", "tokens/s of answers", "/ llama.cpp", "/ vLLM", "s for the prompts"],
        rows,
    )


def main(
    llama_python: Path,
    vllm_python: Path | None = None,
    new_tokens: int = 128,
    rounds: int = 5,
    results: Path = RESULTS / "engine-peers.json",
) -> None:
    """Args:
    llama_python: Python with llama-cpp-python.
    vllm_python: Python with vLLM for CPUs; None leaves it out.
    new_tokens: For each request.
    rounds: Turns that each engine takes.
    results: File for the results as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Any] = {name: Ours(options) for name, options in FORMS.items()}
        runs |= llama_workers(llama_python, Path(folder))
        if vllm_python is not None:
            model, tokenizer = t2.load(MODEL, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            runs[VLLM] = Worker(vllm_python, "vllm_worker.py", folder)
        found: dict[str, dict[str, dict[str, list[float]]]] = {str(count): {} for count in BATCHES}
        for turn in tqdm(range(rounds + 1), desc="turns"):  # the first one warms up
            for count in BATCHES:
                prompts = [[100 + i + j for j in range(PROMPT)] for i in range(count)]
                for name, run in runs.items():
                    seconds = run.run(prompts, new_tokens)
                    for key in ("seconds", "prompt_seconds") if turn else ():
                        found[str(count)].setdefault(name, {}).setdefault(key, []).append(seconds[key])
        workers = {name: run for name, run in runs.items() if isinstance(run, Worker)}
        about = {name: worker.about for name, worker in workers.items()}
        for worker in workers.values():
            worker.close()
    content = {"machine": machine(), "peers": about, "new_tokens": new_tokens, "rounds": rounds, "requests": found}
    write_results(results, content)
    peers_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
