"""`t2 serve`: model, bank, engine and server, until a signal ends it."""

from __future__ import annotations

import ipaddress
import json
import logging
import sys
from pathlib import Path

import torch
import uvicorn

from t2.adaptation.bank_folder import bank_path
from t2.experts.support import Chosen
from t2.generation.engine import Engine
from t2.generation.prompts import eos_ids_of
from t2.model.load import load_svf
from t2.model.svf_model import SVFConfig
from t2.server.app import Server, ServerOptions, make_app
from t2.weights.loading import tokenizer_of


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        content = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        content |= getattr(record, "fields", {})
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log = logging.getLogger("t2.server")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: str,
    *,
    bank: Path | None,
    host: str,
    port: int,
    options: ServerOptions,
    dtype: torch.dtype,
    form: str,
    support: Chosen | None,
    max_rows: int,
    max_tokens: int,
    max_waiting: int,
    max_connections: int,
) -> int:
    """Loads everything, then answers until SIGINT or SIGTERM, after which running answers are finished.

    Raises:
        ValueError: an address that others can reach without any key.
    """
    if not is_loopback(host) and not options.api_keys:
        raise ValueError(f"host: expected a key in --api-keys for an address that others can reach, got {host} without")
    folder = None if bank is None else bank_path(bank)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"bank: expected a folder, got {folder}")
    log_to_stderr()
    if form == "delta" and support is None:
        support = folder
    config = SVFConfig(dtype=dtype, bf16_products=dtype == torch.bfloat16, form=form, support=support)  # type: ignore[arg-type]
    svf, processor = load_svf(model, config)
    tokenizer = tokenizer_of(processor)
    engine = Engine(
        svf,
        eos_ids=eos_ids_of(svf.model, tokenizer),
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_waiting=max_waiting,
    )
    server = Server(svf, tokenizer, engine, model=Path(model).name, bank=folder, options=options)
    names = ", ".join(server.experts.names)
    logging.getLogger("t2.server").info(f"answering on http://{host}:{port}", extra={"fields": {"models": names}})
    uvicorn.run(
        make_app(server),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(options.answer_seconds),
    )
    return 1 if engine.failure is not None else 0
