"""Runs programs that nobody has read, without network, files of the user or other processes, within limits."""

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
