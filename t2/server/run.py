"""`t2 serve`: model, bank, engine and server, until a signal ends it."""

from __future__ import annotations

import ipaddress
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import uvicorn

from t2.generation.compiled_pass import Compilation
from t2.server.app import Server, ServerOptions, make_app
from t2.server.opened import open_engine


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


def check_address(host: str, api_keys: Sequence[str]) -> None:
    """ValueError for an address that others can reach without any key."""
    if not is_loopback(host) and not api_keys:
        raise ValueError(f"host: expected a key in --api-keys for an address that others can reach, got {host} without")


def serve(
    model: str,
    *,
    bank: Path | None,
    host: str,
    port: int,
    options: ServerOptions,
    dtype: torch.dtype,
    form: str,
    support: Path | None,
    max_connections: int,
    compiled: bool = True,
    **limits: int,
) -> int:
    """Loads everything, then answers until SIGINT or SIGTERM, after which running answers are finished.

    compiled: lets passes run compiled (`t2.generation.compiled_pass`).
    limits: of the engine.

    Raises:
        ValueError: an address that others can reach without any key.
    """
    check_address(host, options.api_keys)
    log_to_stderr()
    log = logging.getLogger("t2.server")
    opened = open_engine(model, bank, dtype=dtype, form=form, support=support, news=log.warning, **limits)
    engine = opened.engine
    server = Server(opened, options)
    names = ", ".join(server.experts.names)
    log.info(f"answering on http://{host}:{port}", extra={"fields": {"models": names}})
    config = uvicorn.Config(
        make_app(server),
        host=host,
        port=port,
        http="h11",  # has a limit for headers; others that may be installed have none
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(options.answer_seconds),
    )
    http = uvicorn.Server(config)
    with Compilation(engine, log.info) if compiled else nullcontext():
        engine.alongside(http.serve(), on_signal=http.handle_exit, new_loop=config.get_loop_factory())
    engine.close()
    return 1 if engine.failure is not None else 0
