"""Several servers behind one address, by Ray Serve, and files of requests over several machines, by Ray Data.

    t2 serve MODEL --bank FOLDER --engine ray --replicas 2

Every replica is the server of `t2 serve`, with an engine of its own. The bank's folder lies where the command runs; a
keeper there hands its files to the replicas, wherever they run, and takes the experts that come over HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve as ray_serve

from t2.adaptation.bank_folder import bank_path
from t2.generation.compiled_pass import Compilation
from t2.server.answers import Mail
from t2.server.app import Server, ServerOptions, make_app
from t2.server.batch import Line, answer_line
from t2.server.errors import ApiError
from t2.server.experts import SUFFIX, Experts
from t2.server.opened import Opened, open_engine
from t2.server.run import check_address, log_to_stderr
from t2.server.schema import parsed
from t2kernels.files import replacing

NAME, DESCRIBED = "t2", "domains.json"
LOOK_SECONDS = 0.5
"""Pause between a replica's looks for files that have changed."""
log = logging.getLogger("t2.server")
Stamps = dict[str, tuple[int, int]]


class BankKeeper:
    """The bank's folder, for replicas that may run on other machines."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def changed(self, known: Stamps) -> tuple[dict[str, tuple[tuple[int, int], bytes]], list[str]]:
        """Files that are not as `known` says, with their stamps and contents; and names that are gone."""
        stamps: Stamps = {}
        for path in (*self.folder.glob(f"*{SUFFIX}"), self.folder / DESCRIBED):
            with suppress(FileNotFoundError):
                about = path.stat()
                stamps[path.name] = about.st_mtime_ns, about.st_size
        new = {}
        for name, stamp in stamps.items():
            if known.get(name) != stamp and not name.startswith("."):
                with suppress(FileNotFoundError):
                    new[name] = stamp, (self.folder / name).read_bytes()
        return new, [name for name in known if name not in stamps]

    def put(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all."""
        with replacing(self._path(name)) as temporary:
            temporary.write_bytes(content)

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if Path(name).name != name or name.startswith(".") or not name.endswith(SUFFIX):
            raise ValueError(f"name: expected that of an expert's file, got {name!r}")
        return self.folder / name


class Mirror:
    """A folder with what the keeper has."""

    def __init__(self, keeper: Any, folder: Path) -> None:
        self.keeper, self.folder = keeper, folder
        self._known: Stamps = {}

    def look(self) -> None:
        """Takes over what has changed."""
        new, gone = ray.get(self.keeper.changed.remote(self._known))
        for name, (stamp, content) in new.items():
            with replacing(self.folder / name) as temporary:
                temporary.write_bytes(content)
            self._known[name] = stamp
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)
            del self._known[name]

    def watch(self) -> None:
        """Looks again and again, in a thread of its own."""
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self.look()
            except Exception:
                log.exception("the bank's keeper does not answer")


class Replica:
    """One server of several. Its engine steps in a thread that has also loaded the model.

    Args:
        keeper: the bank's, or None without a bank.
        options: of the server. threads: of the engine's products.
        compiled: lets passes run compiled.
        engine: options of `open_engine`.
    """

    def __init__(
        self, model: str, keeper: Any, options: ServerOptions, threads: int, compiled: bool, engine: dict[str, Any]
    ) -> None:
        log_to_stderr()
        self._folder = tempfile.TemporaryDirectory(prefix="t2-bank-")
        self.mirror = None if keeper is None else Mirror(keeper, Path(self._folder.name))
        if self.mirror is not None:
            self.mirror.look()
            engine["bank"] = self.mirror.folder
        opened: Future[Opened] = Future()
        work = functools.partial(self._step, opened, model, threads, compiled, engine)
        threading.Thread(target=work, name="t2-engine", daemon=True).start()
        self.server = Server(opened.result(), options)
        if self.mirror is not None:
            threading.Thread(target=self.mirror.watch, name="t2-bank", daemon=True).start()

    def _step(self, opened: Future[Opened], model: str, threads: int, compiled: bool, engine: dict[str, Any]) -> None:
        torch.set_num_threads(threads)
        try:
            found = open_engine(model, news=log.warning, **engine)
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(found)
        with Compilation(found.engine, log.info) if compiled else nullcontext():
            found.engine.run()

    def __serve_build_asgi_app__(self) -> Any:
        """The server's application; experts that come over HTTP go on to the keeper."""
        app = make_app(self.server)
        if self.mirror is not None:
            app.add_middleware(Forwarding, mirror=self.mirror)
        return app

    async def check_health(self) -> None:
        """Raises once the engine has failed, so that Ray starts another replica."""
        if self.server.engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self.server.engine.failure}")


class Forwarding:
    """Middleware that tells the keeper of experts that this replica was given or has deleted."""

    def __init__(self, app: Any, mirror: Mirror) -> None:
        self.app, self.mirror = app, mirror

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        start = "/v1/experts/"
        if scope["type"] != "http" or scope["method"] not in ("PUT", "DELETE") or not scope["path"].startswith(start):
            await self.app(scope, receive, send)
            return
        parts: list[bytes] = []

        async def kept() -> Any:
            message = await receive()
            parts.append(message.get("body", b""))
            return message

        messages: list[Any] = []

        async def hold(message: Any) -> None:
            messages.append(message)

        await self.app(scope, kept, hold)
        if messages and messages[0].get("status") == 200:
            name, keeper = scope["path"].removeprefix(start) + SUFFIX, self.mirror.keeper
            await (keeper.put.remote(name, b"".join(parts)) if scope["method"] == "PUT" else keeper.delete.remote(name))
        for message in messages:
            await send(message)


def serve(
    model: str,
    *,
    bank: Path | None,
    host: str,
    port: int,
    options: ServerOptions,
    replicas: int,
    max_replicas: int | None = None,
    replica_cpus: int | None = None,
    replica_gpus: float = 0,
    compiled: bool = True,
    **engine: Any,
) -> int:
    """Starts replicas in the cluster that RAY_ADDRESS names, or in one on this machine, until SIGINT or SIGTERM.

    Args:
        replicas: their number; with `max_replicas` the smallest one, more come with the load.
        replica_cpus: cores of each; default what this machine has, divided by `replicas`.
        replica_gpus: GPUs of each.
        engine: options of `open_engine`.

    Raises:
        FileNotFoundError: no folder of the bank. ValueError: numbers that do not go together, or an address that others
            can reach without any key.
    """
    check_address(host, options.api_keys)
    if replicas < 1 or (max_replicas is not None and max_replicas < replicas):
        raise ValueError(f"replicas: expected 1 <= replicas <= max_replicas, got {replicas} and {max_replicas}")
    folder = None if bank is None else bank_path(bank)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"bank: expected a folder, got {folder}")
    log_to_stderr()
    environment = {name: value for name, value in os.environ.items() if name.startswith(("T2_", "HF_", "OMP_"))}
    ray.init(include_dashboard=False, runtime_env={"env_vars": environment}, log_to_driver=True)
    try:
        ray_serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        cpus = replica_cpus or max(1, (os.cpu_count() or 1) // replicas)
        keeper = None if folder is None else ray.remote(num_cpus=0)(BankKeeper).remote(str(folder))
        room = engine.get("max_rows", 32) + engine.get("max_waiting", 1024)
        scaling: dict[str, Any] = {"num_replicas": replicas}
        if max_replicas is not None:
            limits = {"min_replicas": replicas, "initial_replicas": replicas, "max_replicas": max_replicas}
            scaling = {"autoscaling_config": limits | {"target_ongoing_requests": engine.get("max_rows", 32)}}
        deployed = ray_serve.deployment(
            name=NAME,
            max_ongoing_requests=room,
            ray_actor_options={"num_cpus": cpus, "num_gpus": replica_gpus},
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=options.answer_seconds,
            **scaling,
        )(ray_serve.ingress()(Replica))
        app = deployed.bind(model, keeper, options, cpus, compiled, engine)
        ray_serve.run(app, name=NAME, route_prefix="/")
        log.info(f"answering on http://{host}:{port}", extra={"fields": {"replicas": replicas}})
        _wait_for_signal()
        ray_serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def _wait_for_signal() -> None:
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    while not ended.wait(1):
        pass
    for number, handler in before.items():
        signal.signal(number, handler)


class AnswerRequests:
    """Answers rows of a Ray dataset: `dataset.map_batches(AnswerRequests, fn_constructor_kwargs={"model": ...})`.

    A row has the fields of a line of `t2 generate --input` (prompt or messages, model, max_tokens, ...); what comes out
    has text, expert and finish_reason beside them, or error.

    Args:
        model: as `t2.load` takes it. bank: folder of the experts, or the name of one that ships.
        max_tokens: of answers that name no number.
        dtype: storage of the factors, by name.
        engine: more options of `open_engine`.
    """

    def __init__(
        self, model: str, bank: str | None = None, max_tokens: int = 256, dtype: str = "bfloat16", **engine: Any
    ) -> None:
        folder = None if bank is None else Path(bank)
        self.opened = open_engine(model, folder, dtype=getattr(torch, dtype), news=log.warning, **engine)
        self.experts, self.max_tokens = Experts(self.opened), max_tokens
        self.experts.look()
        with Compilation(self.opened.engine, log.info) as compilation:
            compilation.finish()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A batch of columns with the answers' columns added."""
        columns = {name: [getattr(value, "tolist", lambda v=value: v)() for value in batch[name]] for name in batch}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        found = self.opened.engine.alongside(self._answers(rows))
        for name in ("text", "expert", "finish_reason", "error"):
            columns[name] = [each.get(name) for each in found]
        return columns

    async def _answers(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        mail, room = Mail(self.opened.engine), asyncio.Semaphore(2 * self.opened.engine.max_rows)

        async def one(row: Mapping[str, Any]) -> dict[str, Any]:
            given = {name: value for name, value in row.items() if value is not None}
            try:
                line = parsed(Line, json.dumps(given).encode())
            except ApiError as error:
                return error.body
            async with room:
                return await answer_line(self.experts, mail, line, self.max_tokens)

        return list(await asyncio.gather(*map(one, rows)))
