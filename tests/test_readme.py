from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_tables_are_what_the_results_say():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.render", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found: dict[str, object] = {}
    exec(example, found)
    assert found["out"].shape[0] == 3 and found["y"].shape == (4, 32)
