"""Implementation of `t2 eval`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from t2.adaptation.bank_folder import load_bank_folder
from t2.adaptation.command import open_model
from t2.eval.lora_adapter import LoraAdapter
from t2.eval.plots import write_plots
from t2.eval.report import SECTIONS, Section, document, summary
from t2.eval.result_cache import ResultCache
from t2.eval.runner import Announce, EvalRunner
from t2.eval.sections import measure
from t2.eval.spec import load_spec
from t2.weights.machine import machine
from t2kernels.files import write_text

PACKAGES = ("t2kernels", "torch", "transformers", "tokenizers", "numpy")


def run_evaluation(
    model: str,
    bank: Path,
    spec: Path,
    output: Path,
    *,
    only: Sequence[Section] = SECTIONS,
    dtype: str = "float32",
    bf16_products: bool = False,
    token_budget: int = 16384,
    console: Console | None = None,
) -> bool:
    """Evaluate a bank and write results.json, summary.json (without single examples), tables.md and plots.

    Returns:
        False if it was interrupted; all results so far are in `output / "cells"`, where the next run continues.

    Raises:
        ValueError, FileNotFoundError, FileFormatError: the spec, the bank or a file that the spec names is missing
            or damaged.
    """
    console, loaded, folder = console or Console(), load_spec(spec), load_bank_folder(bank)
    adapter = None if loaded.lora is None else LoraAdapter(model, loaded.lora)
    svf, tokenizer = open_model(model, dtype, folder, bf16_products=bf16_products)
    with _progress(console) as announce:
        runner = EvalRunner(
            svf,
            tokenizer,
            folder,
            loaded,
            ResultCache(output / "cells"),
            adapter=adapter,
            token_budget=token_budget,
            announce=announce,
        )
        try:
            sections = measure(runner, only)
        except KeyboardInterrupt:
            console.print(f"Interrupted. The same command continues from {output / 'cells'}.")
            return False
    results = {
        "format": "t2-eval",
        "format_version": "1",
        "model": model,
        "dtype": dtype,
        "bf16_products": bf16_products,
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "plan": json.loads(Path(spec).read_text()),
        "experts": runner.experts | ({"classifier": runner.classifier} if runner.classifier else {}),
        "sections": sections,
    }
    page = write(results, output)
    console.print(Markdown(page))
    return True


def write(results: dict[str, Any], output: Path) -> str:
    """Write all files of the results atomically, and return the page of tables."""
    page = document(results)
    write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "summary.json", json.dumps(summary(results), indent=1) + "\n")
    write_text(output / "tables.md", page)
    write_plots(results, output)
    return page


@contextmanager
def _progress(console: Console) -> Iterator[Announce]:
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("", total=None)
        said = ""

        def announce(what: str, done: int, total: int) -> None:
            nonlocal said
            if not console.is_terminal and what != said:  # a log gets lines instead
                console.print(what)
                said = what
            bar.update(line, completed=done, total=total, description=what)

        yield announce
