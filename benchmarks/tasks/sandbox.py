"""Hostile programs in the sandbox: what each of them managed, and whether the machine around it was harmed.

    python -m benchmarks.tasks.sandbox

Prints a table and writes benchmarks/results/sandbox.json, for every sandbox backend that works here; exits with 1 if a
program was not stopped. tests/t2/sandbox/test_isolation.py runs the same programs.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Any

import tyro

from benchmarks.common.tables import RESULTS, Table, write_results
from t2.sandbox import Limits, ProgramResult, runner
from t2.weights.machine import machine

TEXT = "a secret of the host"

PRELUDE = """
import ctypes, os, shutil, socket, sys, time

LIBC = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(LIBC, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def attempt(what, act):
    try:
        answer = act()
    except (OSError, MemoryError) as error:
        print(f"{what}: {getattr(error, 'strerror', None) or type(error).__name__}", flush=True)
    else:
        print(f"DONE {what}: {answer}", flush=True)
"""


@dataclass(frozen=True)
class Hostile:
    """Program that attempts something, and how it must end.

    Its standard output must not say DONE, as `attempt` of PRELUDE does where something works. In the source, $secret,
    $canary, $port, $parent and $bystander stand for the targets that `Host` offers.
    """

    name: str
    source: str
    status: str = "exited"
    limits: Limits = field(default_factory=lambda: Limits(timeout=10))


PROGRAMS = (
    Hostile(
        "fork bomb",
        """
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        "timeout",
        Limits(timeout=2, processes=16),
    ),
    Hostile("fork, where one process is allowed", "attempt('fork', os.fork)"),
    Hostile("infinite loop", "while True: pass", "timeout", Limits(timeout=1)),
    Hostile("sleeps forever", "time.sleep(1e6)", "timeout", Limits(timeout=1)),
    Hostile(
        "memory hog",
        """
hoard = []
def allocate():
    while True:
        hoard.append(bytearray(1 << 24))
attempt("allocate", allocate)
""",
    ),
    Hostile(
        "memory that no process owns",
        """
attempt("memfd", lambda: os.memfd_create("hoard"))
attempt("shared memory", lambda: call("shmget", 0, ctypes.c_size_t(1 << 30), 0o1600))
attempt("message queue", lambda: call("msgget", 0, 0o1600))
""",
    ),
    Hostile(
        "reads $HOME",
        """
attempt("open the secret", lambda: open($secret).read())
attempt("list its folder", lambda: os.listdir(os.path.dirname($secret)))
names = [name for _, folders, files in os.walk("/") for name in folders + files]
print("walk over /:", "DONE" if os.path.basename($secret) in names else "not there")
""",
    ),
    Hostile(
        "opens sockets",
        """
attempt("TCP", lambda: socket.create_connection(("127.0.0.1", $port), timeout=2))
attempt("UDP", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", $port)))
attempt("IPv6", lambda: socket.create_connection(("::1", $port), timeout=2))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM).connect((2, $port)))
attempt("local socket", lambda: socket.socket(socket.AF_UNIX).connect("\\0t2-sandbox-$parent"))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
""",
    ),
    Hostile(
        "kills its parent and others",
        """
attempt("parent", lambda: os.kill($parent, 9))
attempt("bystander", lambda: os.kill($bystander, 9))
attempt("all", lambda: os.kill(-1, 9))
os.kill(os.getppid(), 9)
os.kill(1, 9)
time.sleep(0.2)
print("pid 1: lives on")
""",
    ),
    Hostile("kills its process group", "os.kill(0, 9)", "signal"),
    Hostile(
        "deletes files",
        """
attempt("the file of the host", lambda: os.remove($canary))
attempt("the interpreter", lambda: os.remove(sys.executable))
attempt("a library", lambda: os.remove(os.__file__))
attempt("a new library", lambda: open(os.__file__ + ".new", "w"))
mounts = [os.statvfs(path).f_flag & os.ST_RDONLY for path in ("/", os.__file__, sys.executable)]
print("mounts:", "all read-only" if all(mounts) else "DONE writable")
shutil.rmtree("/", ignore_errors=True)
print("rm -r /:", "libraries are there" if os.path.exists(os.__file__) else "DONE")
""",
    ),
    Hostile(
        "prints gigabytes",
        """
while True:
    sys.stdout.write("x" * (1 << 20))
""",
        "output",
    ),
    Hostile(
        "daemon that outlives it",
        """
if os.fork():
    print("left it behind")
    sys.stdout.flush()
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.closerange(0, 64)
time.sleep(1e6)
""",
        limits=Limits(timeout=10, processes=4),
    ),
    Hostile(
        "fills the disk",
        """
def big():
    with open("/tmp/big", "wb") as file:
        while True:
            file.write(bytes(1 << 20))
def many():
    for i in range(1 << 20):
        with open(f"/tmp/{i}", "wb") as file:
            file.write(bytes(1 << 22))
attempt("one file", big)
os.remove("/tmp/big")
attempt("many files", many)
attempt("elsewhere", lambda: open("/usr/lib/big", "wb"))
""",
    ),
    Hostile(
        "looks into its parent",
        """
def is_open(descriptor):
    try:
        return os.fstat(descriptor)
    except OSError:
        return None
attempt("/proc", lambda: os.listdir("/proc"))
attempt("memory", lambda: open("/proc/$parent/mem"))
attempt("ptrace", lambda: call("ptrace", 16, $parent, None, None))
attempt("ptrace of pid 1", lambda: call("ptrace", 16, 1, None, None))
print("open descriptors:", *([f"DONE {d}" for d in range(3, 64) if is_open(d)] or ["none"]))
print("environment:", *("DONE" if "SECRET" in name else name for name in os.environ))
""",
    ),
    Hostile(
        "symlinks and roots",
        """
os.symlink($secret, "/tmp/link")
attempt("a link to the secret", lambda: open("/tmp/link").read())
attempt("the old root", lambda: os.listdir("/.host"))
attempt("above /", lambda: open("/" + "../" * 40 + $secret).read())
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("a disk", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)))
""",
    ),
    Hostile(
        "new namespaces and privileges",
        """
attempt("user namespace", lambda: call("unshare", 0x10000000))
attempt("remount", lambda: call("mount", b"none", b"/", None, ctypes.c_ulong(0x20), None))
attempt("become root", lambda: os.setuid(0))
print("user id:", "DONE 0" if os.getuid() == 0 else "not 0")
""",
    ),
)


class Host:
    """Targets: a secret below $HOME, a file to delete, a listening socket, a process, the environment."""

    def __enter__(self) -> Host:
        self.home = tempfile.TemporaryDirectory(prefix=".t2-sandbox-", dir=Path.home())
        self.secret = Path(self.home.name) / f"secret-{os.getpid()}"
        self.canary = Path(self.home.name) / "canary"
        for path in (self.secret, self.canary):
            path.write_text(TEXT)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.local = socket.socket(socket.AF_UNIX)
        self.local.bind(f"\0t2-sandbox-{os.getpid()}")  # a name without a file: only a network namespace hides it
        self.local.listen()
        for listener in (self.listener, self.local):
            listener.settimeout(0)
        self.bystander = subprocess.Popen(["sleep", "600"])
        os.environ["T2_SECRET"] = TEXT
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        del os.environ["T2_SECRET"]
        self.bystander.kill()
        self.bystander.wait()
        self.listener.close()
        self.local.close()
        self.home.cleanup()

    def harm(self) -> list[str]:
        """Targets that are no longer as they were."""
        found = []
        for path in (self.secret, self.canary):
            if not path.is_file() or path.read_text() != TEXT:
                found.append(f"{path.name} changed")
        for listener in (self.listener, self.local):
            try:
                listener.accept()
                found.append("a listener was reached")
            except BlockingIOError:
                continue
        if self.bystander.poll() is not None:
            found.append("the bystander died")
        if alive := programs_alive():
            found.append(f"{alive} processes outlived the run")
        return found

    def source(self, hostile: Hostile) -> str:
        facts = {
            "secret": repr(str(self.secret)),
            "canary": repr(str(self.canary)),
            "port": self.listener.getsockname()[1],
            "parent": os.getpid(),
            "bystander": self.bystander.pid,
        }
        return PRELUDE + Template(hostile.source).substitute(facts)


def programs_alive() -> int:
    """Processes of sandboxed programs on this machine."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += (entry / "cmdline").read_bytes().endswith(b"utf8\0/tmp/program.py\0")
            except OSError:
                continue
    return count


@dataclass
class Outcome:
    """Outcome of one program: `broken` lists what should not have happened."""

    name: str
    backend: str
    result: ProgramResult
    most_processes: int
    broken: list[str]

    @property
    def happened(self) -> str:
        status, seconds = self.result.status, self.result.seconds
        if status == "timeout":
            return f"{self.most_processes} at once at most; killed after {seconds:.1f} s"
        if status == "output":
            return f"killed after {len(self.result.stdout):,} bytes, {seconds:.1f} s"
        if status == "signal":
            return f"killed by signal {-(self.result.returncode or 0)}"
        said = "; ".join(line for line in self.result.stdout.splitlines() if line)
        return f"{said}; exit code {self.result.returncode}"


def attack(backend: str, hostile: Hostile, host: Host) -> Outcome:
    """Runs one program and counts its processes meanwhile."""
    done, counts = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            counts.append(programs_alive())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = runner.run_with(backend, host.source(hostile), hostile.limits)
    finally:
        done.set()
        watcher.join()
    broken = host.harm()
    broken += [line for line in result.stdout.splitlines() if "DONE" in line]
    if result.status != hostile.status:
        broken.append(f"{result.status} {result.returncode}, expected {hostile.status}: {result.stderr[-500:]}")
    if max(counts) > hostile.limits.processes:
        broken.append(f"{max(counts)} processes at once, {hostile.limits.processes} allowed")
    return Outcome(hostile.name, backend, result, max(counts), broken)


def hello_seconds(backend: str) -> float:
    """Median seconds of a program that prints one line, sandbox included."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        runner.run_with(backend, "print('hello')", Limits())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def attacks_table(results: Any) -> Table:
    """One row for each program: whether each backend stopped it, and what happened under the first one."""
    backends = list(results["hello_seconds"])
    found = {(each["program"], each["backend"]): each for each in results["programs"]}

    def verdict(program: str, backend: str) -> str:
        broken = found[program, backend]["broken"]
        return f"**NOT STOPPED**: {'; '.join(broken)}" if broken else "stopped"

    programs = list(dict.fromkeys(each["program"] for each in results["programs"]))
    hello = ", ".join(f"{seconds * 1000:.0f} ms ({name})" for name, seconds in results["hello_seconds"].items())
    return Table(
        f"{results['machine']['processor']}; a program that prints one line takes {hello}. The last column is "
        "what the program itself printed, or how it was killed:",
        ["program", *backends, "what happened"],
        [
            [program, *(verdict(program, name) for name in backends), found[program, backends[0]]["happened"]]
            for program in programs
        ],
    )


def main(results: Path = RESULTS / "sandbox.json") -> None:
    """Args:
    results: File for the results as JSON.
    """
    rows: list[dict[str, Any]] = []
    reasons = {name: runner.why_not(name) for name in runner.BACKENDS}
    start = time.perf_counter()
    with Host() as host:
        for name, reason in reasons.items():
            if reason is not None:
                print(f"{name}: {reason}")
                continue
            for hostile in PROGRAMS:
                outcome = attack(name, hostile, host)
                rows.append(
                    {
                        "backend": name,
                        "program": hostile.name,
                        "status": outcome.result.status,
                        "happened": outcome.happened,
                        "seconds": round(outcome.result.seconds, 2),
                        "broken": outcome.broken,
                    }
                )
    report = {
        "machine": machine(),
        "backends": reasons,
        "seconds": round(time.perf_counter() - start, 1),
        "hello_seconds": {name: hello_seconds(name) for name, reason in reasons.items() if reason is None},
        "programs": rows,
    }
    write_results(results, report)
    attacks_table(report).show()
    sys.exit(any(row["broken"] for row in rows))


if __name__ == "__main__":
    tyro.cli(main)
