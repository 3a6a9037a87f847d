from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvicorn

import t2
from t2.adaptation.bank_folder import save_bank_folder
from t2.generation.engine import Engine
from t2.server.app import Server, ServerOptions, make_app
from t2.server.opened import Opened
from tests.t2.toy import toy_model, toy_tokenizer


class Running:
    """A server in a thread."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.engine, self.url = server, server.engine, url


@pytest.fixture
def bank(tmp_path) -> Path:
    svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
    domains = {"red": "one", "green": "two"}
    experts = {name: t2.Expert.random(svf.layout, seed=i, std=0.5) for i, name in enumerate(domains)}
    save_bank_folder(tmp_path / "bank", domains, experts)
    return tmp_path / "bank"


@pytest.fixture
def serving(bank) -> Iterator[Callable[..., Running]]:
    with ExitStack() as held:

        def start(
            max_rows: int = 4, max_tokens: int = 60, max_waiting: int = 64, eos_ids: tuple[int, ...] = (2,), **options
        ) -> Running:
            svf = t2.SVFModel(toy_model(), t2.SVFConfig(progress=False))
            engine = Engine(svf, eos_ids=eos_ids, max_rows=max_rows, max_tokens=max_tokens, max_waiting=max_waiting)
            server = Server(Opened(svf, toy_tokenizer(), engine, "toy", bank), ServerOptions(**options))
            listening = socket.socket()
            listening.bind(("127.0.0.1", 0))
            http = uvicorn.Server(uvicorn.Config(make_app(server), log_config=None, timeout_graceful_shutdown=5))
            serving = http.serve(sockets=[listening])
            thread = threading.Thread(target=engine.alongside, args=(serving,), daemon=True)
            thread.start()

            def stop() -> None:
                http.should_exit = True
                thread.join(30)
                assert not thread.is_alive()

            held.callback(stop)
            while not http.started:
                assert thread.is_alive()
                thread.join(0.01)
            return Running(server, f"http://127.0.0.1:{listening.getsockname()[1]}")

        yield start
