from __future__ import annotations

import os

# Read when torch is first imported. One thread a process: small models are fastest so, and workers run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

# Read when triton is first imported, by whatever test: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


collect_ignore = [] if find_spec("vllm") else ["vllm"]  # `make test-vllm`


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all tests of a run, in whatever worker: factors and cost model are made once."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "t2-cache").mkdir(exist_ok=True)
    return base / "t2-cache"


@pytest.fixture(autouse=True)
def _cache(request: pytest.FixtureRequest, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests leave the user's cache alone, except those of real models, whose factors take minutes."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("T2_CACHE", str(shared_cache))


@pytest.fixture
def sandbox_turn() -> Iterator[None]:
    """Tests that count sandboxed processes, or start some, take turns on this machine."""
    with FileLock(Path(tempfile.gettempdir()) / "t2-tests-sandbox.lock"):
        yield
