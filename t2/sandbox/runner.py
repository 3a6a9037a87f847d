"""Programs in the sandbox: `run_program`, its limits, and the tools that isolate.

Every run gets namespaces of its own (processes, mounts, network, IPC, host name, users), a root folder in memory that
holds the Python interpreter and the system's libraries, read-only, and a /tmp of its own; a user id without
privileges; a seccomp filter (`launcher.py`); and limits. bubblewrap makes the namespaces where it is installed,
otherwise the launcher does, with the same system calls. Before the first program runs, a probe tries to break out.
"""

from __future__ import annotations

import binascii
import functools
import json
import marshal
import math
import os
import platform
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal, TypeVar

from t2.sandbox import candidate, judge, launcher, wire

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")
Status = Literal["exited", "signal", "timeout", "output"]
SETUP_SECONDS = 30.0  # for the namespaces, on a busy machine
END_SECONDS = 10.0  # for killed processes to be gone
SMALLEST_MEMORY = 64 << 20
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
UNSANDBOXED = "none"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
BOOT = "import binascii,marshal,sys;exec(marshal.loads(binascii.a2b_base64(sys.argv[1])))"
"""Python that runs a launcher, compiled already, from its first argument."""


class SandboxError(OSError):
    """A program could not be run."""


class SandboxUnavailable(SandboxError):
    """Nothing on this machine isolates a program."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    timeout: seconds by the clock. Each process may use as many processor seconds, rounded up, and one more.
    memory_bytes: address space of each process.
    output_bytes: of standard output and standard error together.
    disk_bytes: of its folder /tmp, which is in memory, and of a file.
    processes: at once, threads included. Before Linux 5.14 all processes of the user count.
    """

    timeout: float = 3.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 16 << 20
    processes: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.timeout, int | float) and math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout!r}")
        least = {"memory_bytes": SMALLEST_MEMORY, "output_bytes": 1, "disk_bytes": 1 << 16, "processes": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name}: expected an integer >= {smallest:,}, got {value!r}")


@dataclass(frozen=True)
class ProgramResult:
    """Outcome of a program.

    status: "exited" by itself, "signal" that killed it, "timeout" or "output" for the limit at which all its processes
        were killed.
    returncode: its exit code, or minus the signal; None if it was killed at a limit.
    stdout, stderr: the first `Limits.output_bytes` of what it wrote.
    seconds: by the clock, from its start to the end of its last process.
    """

    status: Status
    returncode: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """True if it exited with code 0. A program can fake this: use `run_tests` for untrusted ones."""
        return self.status == "exited" and self.returncode == 0


def run_program(source: str, limits: Limits | None = None, *, allow_unsandboxed: bool = False) -> ProgramResult:
    """Runs a Python program in a sandbox and returns when none of its processes is left.

    The program has the interpreter that runs this process, and the standard library. Its environment is empty but for
    a fixed hash seed, standard input too.

    Args:
        source: the program.
        limits: default `Limits()`.
        allow_unsandboxed: where nothing isolates, run the program all the same, with the rights of this process
            (a warning says so). Time, output and memory stay limited; files, network and processes do not.

    Raises:
        TypeError: `source` is not a string.
        SandboxUnavailable: nothing isolates programs here, and `allow_unsandboxed` is not set.
        SandboxError: the sandbox could not be set up this time.
    """
    return run_programs([source], limits, allow_unsandboxed=allow_unsandboxed)[0]


def run_programs(
    sources: Sequence[str],
    limits: Limits | None = None,
    *,
    parallel: int | None = None,
    allow_unsandboxed: bool = False,
) -> list[ProgramResult]:
    """Runs programs, each in a sandbox of its own, `parallel` at a time (default: one for each processor).

    Everything else as in `run_program`.
    """
    limits = limits or Limits()
    if isinstance(sources, str):
        raise TypeError("sources: expected a list of programs, got one string")
    for index, source in enumerate(sources):
        if not isinstance(source, str):
            raise TypeError(f"program {index}: expected a string, got {type(source).__name__}")
    return run_each(lambda name, source: run_with(name, source, limits), sources, parallel, allow_unsandboxed)


def run_each(
    run: Callable[[str, Item], Outcome], items: Sequence[Item], parallel: int | None, allow_unsandboxed: bool
) -> list[Outcome]:
    """`run(backend, item)` of each item, `parallel` at a time, in the order of the items."""
    parallel = len(os.sched_getaffinity(0)) if parallel is None else parallel
    if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
        raise ValueError(f"parallel: expected an integer >= 1, got {parallel!r}")
    try:
        name = backend()
    except SandboxUnavailable as error:
        if not allow_unsandboxed:
            raise
        warnings.warn(f"programs run with the rights of this process: {error}", RuntimeWarning, stacklevel=3)
        name = UNSANDBOXED
    with ThreadPoolExecutor(min(parallel, max(1, len(items)))) as pool:
        return list(pool.map(lambda item: run(name, item), items))


def backend() -> str:
    """The name of the first tool that isolates programs on this machine.

    Raises:
        SandboxUnavailable: there is none; the message has the reason for each, and what to do.
    """
    reasons = []
    for name in BACKENDS:
        reason = why_not(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise SandboxUnavailable(
        f"nothing here isolates programs ({'; '.join(reasons)}). Install bubblewrap, allow user namespaces to "
        "unprivileged users, or run untrusted programs with your own rights by allow_unsandboxed=True"
    )


def why_not(name: str) -> str | None:
    """Reason why one of BACKENDS does not isolate programs here, by a trial once per process; None if it does."""
    with _probing:
        if name not in _probed:
            _probed[name] = _probe(name)
        return _probed[name]


# Backends: the command that starts the launcher


def _launch(config: dict[str, Any]) -> list[str]:
    arguments = (marshal.dumps(compiled(launcher)), marshal.dumps(config))
    encoded = [binascii.b2a_base64(each, newline=False).decode() for each in arguments]
    return [config["python"], "-s", "-S", "-P", "-B", "-X", "utf8", "-c", BOOT, *encoded]


@functools.cache
def compiled(module: ModuleType) -> CodeType:
    """A module's code. The sandbox has the same interpreter, but not this package."""
    assert module.__file__
    return compile(Path(module.__file__).read_text(), f"<{module.__name__}>", "exec", dont_inherit=True)


def _bubblewrap(config: dict[str, Any]) -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("not installed")
    command = [program, "--new-session", "--as-pid-1", "--info-fd", str(config["info_fd"])]
    command += [f"--unshare-{namespace}" for namespace in ("pid", "net", "ipc", "uts", "cgroup-try")]
    if config["uid"] is None:
        nobody = str(launcher.NOBODY)
        command += ["--unshare-user", "--uid", nobody, "--gid", nobody, "--disable-userns"]
    else:  # the launcher takes this user id, which our user namespace has no number for
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    folders = {str(folder) for path in (*config["binds"], *config["devices"]) for folder in Path(path).parents}
    for folder in sorted(folders - {"/"}):  # those above a bind would be for their owner only
        command += ["--perms", "0755", "--dir", folder]
    for path in config["binds"]:
        command += ["--ro-bind", path, path]
    for path in config["hidden"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    for target, link in config["symlinks"]:
        command += ["--symlink", target, link]
    for path in config["devices"]:
        command += ["--dev-bind", path, path]
    command += ["--size", str(config["disk_bytes"]), "--perms", "1777", "--tmpfs", "/tmp", "--remount-ro", "/"]
    command += ["--hostname", "sandbox", "--chdir", "/tmp", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command.append("--")
    return command + _launch(config)


def _namespaces(config: dict[str, Any]) -> list[str]:
    return _launch({**config, "namespaces": True})


def _unsandboxed(config: dict[str, Any]) -> list[str]:
    return _launch({**config, "isolated": False})


BACKENDS: dict[str, Callable[[dict[str, Any]], list[str]]] = {"bubblewrap": _bubblewrap, "namespaces": _namespaces}


def _configuration(limits: Limits) -> dict[str, Any]:
    """The configuration of `launcher.py`, as for bubblewrap."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    prefix = os.path.realpath(sys.base_prefix)
    system = [f"{folder}/{name}" for folder in ("/usr", "") for name in ("lib", "lib64", "lib32")]
    binds: list[str] = []
    symlinks: list[tuple[str, str]] = []
    for path in (*system, f"{prefix}/lib", f"{prefix}/{sys.platlibdir}", python, "/etc/ld.so.cache"):
        if os.path.islink(path):
            symlinks.append((os.readlink(path), path))
        elif os.path.exists(path) and not any(path == bind or path.startswith(f"{bind}/") for bind in binds):
            binds.append(path)
    return {
        "namespaces": False,
        "isolated": True,
        "uid": _free_user_id(),
        "python": python,
        "binds": binds,
        "symlinks": symlinks,
        "hidden": [path for path in _installed(prefix) if any(path.startswith(f"{bind}/") for bind in binds)],
        "channel": [],
        "devices": [path for path in DEVICES if os.path.exists(path)],
        "cpu_seconds": math.ceil(limits.timeout) + 1,
        "memory_bytes": limits.memory_bytes,
        "disk_bytes": limits.disk_bytes,
        "processes": limits.processes,
    }


@functools.cache
def _installed(prefix: str) -> list[str]:
    """Folders of installed packages, whose data may hold a benchmark's solutions and tests."""
    folders = ("/usr/lib", "/usr/lib64", f"{prefix}/lib")
    found = [path for folder in folders for path in glob(f"{folder}/python3*/*-packages")]
    return sorted({os.path.realpath(path) for path in found if os.path.isdir(path)})


def _free_user_id() -> int | None:
    """An unused user id for programs of root, whom limits do not bind; None for other users."""
    users = Path("/proc/self/uid_map")
    if os.geteuid() != 0 or (users.exists() and users.read_text().split() != ["0", "0", "4294967295"]):
        return None
    return (1 << 30) + secrets.randbelow(1 << 28)


# One run


def run_with(name: str, source: str, limits: Limits) -> ProgramResult:
    """Runs a program with one of BACKENDS, or UNSANDBOXED."""
    with _started(name, limits) as run:
        run.wait_until_ready()
        return run.result(source.encode(errors="surrogatepass"))


def judge_with(name: str, source: str, tests: Sequence[Any], limits: Limits) -> bool:
    """Runs a program in one sandbox and its tests in another, with two pipes between them.

    Only the process of the tests decides: it alone knows the mark that it has to print. The program has no descriptor
    for that, and no process of its own sandbox knows the tests.

    Args:
        name: one of BACKENDS, or UNSANDBOXED.
        source: the program.
        tests: arguments of `judge.main` between the descriptors and the mark.
        limits: of each of the two sandboxes; the time limit starts with the slower one.

    Returns:
        Whether the tests came to their end.
    """
    mark = secrets.token_hex(16)
    with ExitStack() as held:
        with ExitStack() as ours:  # the sandboxes alone hold the pipes, so that each sees the other's end
            (requested, request), (replied, reply) = os.pipe(), os.pipe()
            for descriptor in (requested, request, replied, reply):
                ours.callback(os.close, descriptor)
            asking = held.enter_context(_started(name, limits, (replied, request)))
            answering = held.enter_context(_started(name, limits, (requested, reply)))
        for run in (asking, answering):
            run.wait_until_ready()
        program = _payload((wire, candidate), (source.encode(errors="surrogatepass"),))
        pool = held.enter_context(ThreadPoolExecutor(1))
        answered = pool.submit(answering.result, program)
        held.callback(answering.kill)
        verdict = asking.result(_payload((wire, judge), (*tests, mark.encode())))
        answering.kill()
        answered.result()
    return verdict.ok and verdict.stdout == mark


def _payload(modules: Sequence[ModuleType], arguments: Sequence[Any]) -> bytes:
    """Input of a launcher with a channel: modules as code, and the arguments of `main` in the last one."""
    return marshal.dumps(([(module.__name__, compiled(module)) for module in modules], tuple(arguments)))


@contextmanager
def _started(name: str, limits: Limits, channel: Sequence[int] = ()) -> Iterator[_Run]:
    """A running launcher, killed with all of its processes at the end of the block.

    Args:
        name: one of BACKENDS, or UNSANDBOXED.
        limits: of its program.
        channel: descriptors that the program gets.
    """
    with ExitStack() as held:
        folder = "/"
        make_command = BACKENDS.get(name, _unsandboxed)
        if name == UNSANDBOXED:
            folder = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        config = _configuration(limits)
        config["channel"] = list(channel)
        (status, config["status_fd"]), (info, config["info_fd"]) = os.pipe(), os.pipe()
        theirs = (config["status_fd"], config["info_fd"])
        for descriptor in (status, info):
            held.callback(os.close, descriptor)
        try:
            process = subprocess.Popen(
                make_command(config),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=ENVIRONMENT,
                pass_fds=(*theirs, *channel),
                start_new_session=True,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        held.enter_context(process)
        run = _Run(process, status, limits, None if name == UNSANDBOXED else info)
        held.callback(run.kill)
        yield run


class _Run:
    """A launcher and its program: feeds it, reads it, and kills it at its limits."""

    def __init__(self, process: subprocess.Popen[bytes], status: int, limits: Limits, info: int | None) -> None:
        self.process = process
        self.status = status
        self.limits = limits
        self.info = info
        self.killing = threading.Lock()
        self.first_process: int | None = None
        """A pidfd of the first process in the namespace: with it all others die."""
        assert process.stdin and process.stdout and process.stderr
        self.output = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray(), status: bytearray()}

    def wait_until_ready(self) -> None:
        """Waits until the namespaces are there. The first process waits for the program, so its id is still its own."""
        if self.info is None:
            return
        text = bytearray()
        deadline = time.monotonic() + SETUP_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.info, selectors.EVENT_READ)
            while not text.rstrip().endswith(b"}"):
                if not selector.select(deadline - time.monotonic()):
                    raise SandboxError(f"the sandbox was not there after {SETUP_SECONDS:.0f} s")
                part = os.read(self.info, 4096)
                if not part:
                    raise SandboxError(self.reason())
                text += part
        with suppress(ProcessLookupError):
            self.first_process = os.pidfd_open(json.loads(text)["child-pid"])

    def reason(self) -> str:
        """Reason why the launcher gave up before the program ran."""
        assert self.process.stderr
        self.kill()
        errors = self.process.stderr.read().decode(errors="replace").strip()
        report = os.read(self.status, 1 << 16)
        return report.decode().removeprefix("error ") or errors or f"exit code {self.process.wait()}"

    def kill(self) -> None:
        """Kills every process, from any thread; what they held open closes once they are gone."""
        with self.killing:
            if self.first_process is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.first_process, signal.SIGKILL)
                os.close(self.first_process)
                self.first_process = None
            elif self.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)

    def result(self, program: bytes) -> ProgramResult:
        ended = self.communicate(program)
        stdout, stderr, report = (bytes(part) for part in self.output.values())
        status: Status = "exited"
        returncode: int | None = None
        if ended is not None:
            status = ended
        elif not report:  # the launcher itself was killed, by the system when memory ran out for instance
            status, returncode = "signal", -signal.SIGKILL
        else:
            kind, _, text = report.decode().partition(" ")
            if kind == "error":
                raise SandboxError(text)
            returncode = int(text)
            status = "signal" if returncode < 0 else "exited"
        kept = stdout[: self.limits.output_bytes]
        return ProgramResult(
            status=status,
            returncode=returncode,
            stdout=kept.decode(errors="replace"),
            stderr=stderr[: self.limits.output_bytes - len(kept)].decode(errors="replace"),
            seconds=self.seconds,
        )

    def communicate(self, program: bytes) -> Literal["timeout", "output"] | None:
        """Send the program and read until every process is gone; return the limit it hit, if any."""
        assert self.process.stdin
        stdin = self.process.stdin.fileno()
        unsent = memoryview(len(program).to_bytes(8, "big") + program)
        ended: Literal["timeout", "output"] | None = None
        start = time.monotonic()
        deadline = start + self.limits.timeout
        with selectors.DefaultSelector() as selector:
            os.set_blocking(stdin, False)
            selector.register(stdin, selectors.EVENT_WRITE)
            for descriptor in self.output:
                selector.register(descriptor, selectors.EVENT_READ)
            reading = set(self.output)
            while reading:
                left = deadline - time.monotonic()
                if left <= 0:
                    if ended is not None:
                        raise SandboxError(f"killed processes were still there after {END_SECONDS:.0f} s")
                    ended, deadline = "timeout", time.monotonic() + END_SECONDS
                    self.kill()
                    continue
                for key, _ in selector.select(left):
                    if key.fd == stdin:
                        try:
                            unsent = unsent[os.write(stdin, unsent) :]
                        except BrokenPipeError:
                            unsent = unsent[:0]
                        if not unsent:  # it stays open: its end would tell the launcher that we have died
                            selector.unregister(stdin)
                        continue
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fd)
                        reading.remove(key.fd)
                    elif ended is None:
                        self.output[key.fd] += part
                written = sum(len(part) for descriptor, part in self.output.items() if descriptor != self.status)
                if ended is None and written > self.limits.output_bytes:
                    ended, deadline = "output", time.monotonic() + END_SECONDS
                    self.kill()
        self.seconds = time.monotonic() - start
        self.process.wait()
        return ended


# The probe

_probing = threading.Lock()
_probed: dict[str, str | None] = {}

_PROBE = """
import os, socket, time
found = []
def attempt(what, act):
    try:
        act()
    except (OSError, MemoryError):
        return
    found.append(what)
def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=1)
def fork_often():
    for _ in range(8):
        if not os.fork():
            time.sleep(1)
            os._exit(0)
attempt("reads files of the host", lambda: open({canary!r}).read())
attempt("writes outside its folder", lambda: open("/canary", "w"))
attempt("reaches the network", connect)
attempt("sees other processes", lambda: os.kill({pid}, 0))
attempt("uses more memory than allowed", lambda: bytearray({memory}))
attempt("starts more processes than allowed", fork_often)
if os.getuid() == 0:
    found.append("keeps its privileges")
print("isolated" if not found else "a program " + ", ".join(found), end="", flush=True)
"""


def _probe(name: str) -> str | None:
    """Reason why a backend does not isolate here; None if it does."""
    if sys.platform != "linux" or platform.machine() not in launcher.AUDIT_ARCH:
        return f"written for Linux on {' and '.join(launcher.AUDIT_ARCH)}, not {sys.platform} on {platform.machine()}"
    limits = Limits(timeout=20, processes=2)
    with tempfile.NamedTemporaryFile("w") as canary, socket.create_server(("127.0.0.1", 0)) as listener:
        source = _PROBE.format(
            port=listener.getsockname()[1],
            canary=canary.name,
            pid=os.getpid(),
            memory=limits.memory_bytes,
        )
        try:
            result = run_with(name, source, limits)
        except OSError as error:
            return str(error)
    if result.stdout == "isolated":
        return None
    return result.stdout or result.stderr.strip() or f"the probe ended by {result.status} {result.returncode}"
