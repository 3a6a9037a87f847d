"""Programs of the tests that start other processes."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    """One thread a process, and the packages that this process imports: not those of the folder it is started in."""
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    own = {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return os.environ | own
