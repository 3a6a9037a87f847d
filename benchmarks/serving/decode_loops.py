"""The two decode loops of the package on the answers of a whole task: `complete` and the engine.

    python -m benchmarks.serving.decode_loops

128 problems of the sums domain, greedy, with the shipped expert in bfloat16 factors: the answers as they are, of three
tokens or so, and answers of 96 tokens. All prompts begin with the same words. Writes
benchmarks/results/decode-loops.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import t2
from benchmarks.common.tables import RESULTS, Table, write_results
from benchmarks.training.train_experts import TASKS
from t2.adaptation.bank_folder import bank_path
from t2.generation.cached_batch import SVFRunner
from t2.generation.compiled_pass import Compilation
from t2.generation.decode import DecodeOptions, complete
from t2.generation.engine import Engine
from t2.generation.prompts import encode, eos_ids_of
from t2.generation.row_cache import PrefixStore
from t2.tasks import get
from t2.weights.machine import machine

MODEL, DOMAIN, PROBLEMS, LONG = "smollm2-135m-instruct", "sums", 128, 96
ROWS = (32, 64, 128)
LOOPS = ("complete", "engine", "engine, compiled")


def loops_table(results: Any) -> Table:
    """Seconds of each loop, by the length of answers and the number of rows."""
    rows = []
    for length, by_rows in results["seconds"].items():
        for count, found in by_rows.items():
            rows.append([length, count, *(f"{statistics.median(found[loop]):.2f}" for loop in LOOPS)])
    about = results["machine"]
    return Table(
        f"Seconds for {PROBLEMS} answers of the {DOMAIN} domain (SmolLM2, bfloat16 factors, {about['threads']} cores "
        f"of {about['processor']}, medians of {results['rounds']}; `python -m benchmarks.serving.decode_loops`):",
        ["answers", "rows at a time", *LOOPS],
        rows,
    )


def by_engine(engine: Engine, prompts: Sequence[Tensor], new_tokens: int) -> None:
    engine.prefixes = PrefixStore(engine.prefixes.limit)  # a task's prompts are new to it
    for prompt in prompts:
        engine.submit(prompt.tolist(), lambda event: None, max_tokens=new_tokens, expert=DOMAIN)
    while engine.step():
        pass


def by_complete(svf: t2.SVFModel, prompts: Sequence[Tensor], options: DecodeOptions, rows: int) -> None:
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        each = [0] * len(part)
        complete(SVFRunner(svf), part, options, candidates=each, route=lambda found: svf.route([DOMAIN] * len(found)))


def seconds(run: Callable[[], None], rounds: int) -> list[float]:
    run()  # memory is taken
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def main(rounds: int = 3, results: Path = RESULTS / "decode-loops.json") -> None:
    """Args:
    rounds: Measurements of each.
    results: File for the results as JSON.
    """
    model, tokenizer = t2.load(MODEL)
    svf = t2.SVFModel(model, t2.SVFConfig(dtype=torch.bfloat16, bf16_products=True, progress=False))
    svf.add_expert(DOMAIN, t2.Expert.load(bank_path(MODEL) / f"{DOMAIN}.safetensors"))
    name, options = TASKS[DOMAIN]
    task = get(name, **options)
    prompts = [encode(problem, tokenizer) for problem in task.problems("test")[:PROBLEMS]]
    never = (len(tokenizer) - 1,)
    lengths = {
        "as they are": (task.max_new_tokens, tuple(eos_ids_of(model, tokenizer))),
        f"{LONG} tokens": (LONG, never),
    }
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for label, (new_tokens, eos_ids) in lengths.items():
        limits = DecodeOptions(new_tokens, eos_ids, int(tokenizer.pad_token_id), svf.sigma.device)
        for rows in tqdm(ROWS, desc=label):
            engine = Engine(svf, eos_ids=eos_ids, max_rows=rows, max_tokens=256, chunk=1024)
            own = found.setdefault(label, {}).setdefault(str(rows), {})
            own["complete"] = seconds(lambda n=rows, o=limits: by_complete(svf, prompts, o, n), rounds)
            own["engine"] = seconds(lambda e=engine, n=new_tokens: by_engine(e, prompts, n), rounds)
            news: list[str] = []
            with Compilation(engine, news.append) as compilation:
                compilation.finish()
            if engine.compiled is None:
                raise RuntimeError(news[0])
            own["engine, compiled"] = seconds(lambda e=engine, n=new_tokens: by_engine(e, prompts, n), rounds)
    content = {"machine": machine(), "rounds": rounds, "seconds": found}
    write_results(results, content)
    loops_table(content).show()


if __name__ == "__main__":
    tyro.cli(main)
