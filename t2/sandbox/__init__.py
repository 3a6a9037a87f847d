"""Runs programs that nobody has read, without network, files of the user or other processes, within limits."""

from t2.sandbox.runner import (
    Limits,
    Result,
    SandboxError,
    SandboxUnavailable,
    backend,
    run_program,
    run_programs,
)

__all__ = ["Limits", "Result", "SandboxError", "SandboxUnavailable", "backend", "run_program", "run_programs"]
