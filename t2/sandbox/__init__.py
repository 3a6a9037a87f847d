"""Sandbox for untrusted programs: no network, no user files, no other processes, and resource limits."""

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
