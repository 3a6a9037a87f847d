"""Sandbox for untrusted programs: no network, no user files, no other processes, and resource limits."""

import warnings
from typing import Any

from t2.sandbox.runner import (
    Limits,
    ProgramResult,
    SandboxError,
    SandboxUnavailable,
    backend,
    run_program,
    run_programs,
)
from t2.sandbox.verdicts import Test, run_tests

__all__ = [
    "Limits",
    "ProgramResult",
    "SandboxError",
    "SandboxUnavailable",
    "Test",
    "backend",
    "run_program",
    "run_programs",
    "run_tests",
]


def __getattr__(name: str) -> Any:
    """The class of version 0.1 by its old name."""
    if name == "Result":
        text = "t2.sandbox.Result is now t2.sandbox.ProgramResult; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return ProgramResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
