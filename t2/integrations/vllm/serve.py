"""`t2 serve --engine vllm`: vLLM's own server, told of the bank."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from t2.adaptation.bank_folder import bank_path
from t2.integrations.vllm.bank import BANK, SUPPORT, Bank
from t2.integrations.vllm.names import method_name
from t2.server.run import check_address
from t2.weights.streaming import checkpoint_folder

MIDDLEWARE = "t2.integrations.vllm.bank_middleware.BankMiddleware"


def vllm_command(
    model: str,
    *,
    bank: Path,
    host: str,
    port: int,
    factor_dtype: str,
    form: str,
    max_rows: int,
    max_tokens: int,
    api_keys: Sequence[str] = (),
    compiled: bool = True,
) -> list[str]:
    """The arguments of `vllm serve` for a model and a bank.

    Raises:
        ValueError, FileNotFoundError: a form and storage that do not go together, or no folder of the model or bank.
    """
    folder = checkpoint_folder(model)
    dtype = factor_dtype if factor_dtype in ("float32", "float16") else "bfloat16"
    arguments = ["serve", str(folder), "--served-model-name", Path(model).name, "base"]
    arguments += ["--host", host, "--port", str(port), "--dtype", dtype]
    arguments += ["--quantization", method_name(form, factor_dtype)]
    arguments += ["--enable-lora", "--max-lora-rank", "1"]
    arguments += ["--max-loras", str(max_rows), "--max-num-seqs", str(max_rows)]
    arguments += ["--max-model-len", str(max_tokens), "--middleware", MIDDLEWARE]
    if targets := Bank(bank).target_modules:
        arguments += ["--lora-target-modules", *targets]
    if not compiled:
        arguments.append("--enforce-eager")
    return arguments + (["--api-key", *api_keys] if api_keys else [])


def serve(
    model: str, *, bank: Path | None, support: Path | None, host: str, api_keys: Sequence[str] = (), **options: object
) -> int:
    """Becomes `vllm serve`, after the command was written to standard error.

    Raises:
        ValueError: no bank, or an address that others can reach without any key. ImportError: no vLLM. Others as
            `vllm_command`.
    """
    check_address(host, api_keys)
    if find_spec("vllm") is None:
        raise ImportError("engine: expected vLLM beside this package (`pip install vllm`), found none")
    if bank is None:
        raise ValueError("bank: expected a folder of experts, which vLLM reads, got none")
    folder = bank_path(bank)
    if not folder.is_dir():
        raise FileNotFoundError(f"bank: expected a folder, got {folder}")
    arguments = vllm_command(model, bank=folder, host=host, api_keys=api_keys, **options)  # type: ignore[arg-type]
    added = {BANK: str(folder)} | ({} if support is None else {SUPPORT: str(support)})
    shown = [argument if i == 0 or arguments[i - 1] != "--api-key" else "..." for i, argument in enumerate(arguments)]
    print(*(f"{name}={value}" for name, value in added.items()), "vllm", *shown, file=sys.stderr, flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments], os.environ | added)
