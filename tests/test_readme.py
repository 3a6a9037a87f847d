from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.render", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    """Trains two experts on JSONL files and serves both beside the base."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    things = ("parcel", "order", "invoice", "refund", "letter", "book", "phone", "lamp", "chair", "bike", "box", "cup")
    rows = {
        "support": [(f"Where is my {name}?", f"Please send us the number of your {name}.") for name in things],
        "sql": [(f"List all {name}s.", f"SELECT * FROM {name}s;") for name in ("user", *things)],
    }
    monkeypatch.chdir(tmp_path)
    for name, pairs in rows.items():
        lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs]
        Path(f"{name}.jsonl").write_text("".join(lines))
    found: dict[str, Any] = {}
    exec(example, found)
    out, prompt = found["out"], found["batch"]["input_ids"].shape[1]
    support, sql, base = found["tokenizer"].batch_decode(out[:, prompt:], skip_special_tokens=True)
    assert "number of your" in support and "SELECT" in sql and "SELECT" not in base
