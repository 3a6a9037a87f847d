"""The part of the sandbox that runs beside the program: `python -c <BOOT of runner.py> <this file> <configuration>`.

Standard library only, since it runs where nothing else is installed. With `"namespaces": true` it makes the namespaces
and the root folder itself; under bubblewrap it starts where those are made. Then it gives up every privilege, starts
the program with its limits, waits for it as the first process of the process namespace, and reports how it ended:
when it ends itself, the kernel kills all that the program left behind. The program is a script for an interpreter of
its own, or, with `"channel"`, a module of this package that goes on in a fork of this interpreter (`judge.py`,
`candidate.py`).

The program comes by standard input, its length first, and the caller keeps that open: its end means that the caller has
died, before which nothing may run and after which nothing may live on. (A death signal of the parent would not do: who
has another user id than its parent need not get it.)
"""

from __future__ import annotations

import binascii
import contextlib
import ctypes
import marshal
import os
import resource
import select
import signal
import struct
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
FILES = 64
"""Maximum number of open files of a process."""
INODES = 4096
"""Maximum number of files in the program's folder."""

MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of system calls by architecture: (x86_64, aarch64).
DENIED = {
    # memory that no limit of a process counts
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # other processes and namespaces
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
}
CLONE, CLONE3, SOCKETS = (56, 220), (435, 435), ((41, 198), (53, 199))
AF_UNIX = 1
EPERM, ENOSYS = 1, 38


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library; OSError with its name if it fails."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    names = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    try:
        call("mount", names[0], names[1], names[2], ctypes.c_ulong(flags), names[3])
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({source} on {target})") from error


def make_read_only(path: str, flags: int = 0) -> None:
    """Remount a path read-only; with AT_RECURSIVE also all mounts below it."""
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    structure = struct.pack("=QQQQ", attributes, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, structure, ctypes.c_size_t(len(structure)))


def enter_namespaces(config: dict[str, Any]) -> None:
    """Continue in a child, the first process of new namespaces; this process waits for it and then exits."""
    uid, gid = os.geteuid(), os.getegid()
    own_users = config["uid"] is None
    call("unshare", NAMESPACES | (CLONE_NEWUSER if own_users else 0))
    if own_users:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    first = os.fork()
    if first:
        os.write(config["info_fd"], b'{"child-pid": %d}' % first)
        for descriptor in (config["info_fd"], config["status_fd"], *config["channel"]):
            os.close(descriptor)
        os.waitpid(first, 0)
        os._exit(0)
    os.close(config["info_fd"])
    os.setsid()
    build_root(config)
    call("sethostname", b"sandbox", 7)


def build_root(config: dict[str, Any]) -> None:
    """A root folder in memory with nothing but what the configuration names, read-only, and an empty /tmp."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size=1m,nr_inodes={INODES}")
    os.mkdir("/tmp/.host")
    call("syscall", PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/.host")
    os.chdir("/")
    for path in (*config["binds"], *config["devices"]):
        if os.path.isdir("/.host" + path):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644))
        mount("/.host" + path, path, None, MS_BIND | MS_REC)
        if path not in config["devices"]:
            make_read_only(path, AT_RECURSIVE)
    for path in config["hidden"]:
        mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=755,size=4k,nr_inodes=1")
    for target, link in config["symlinks"]:
        os.symlink(target, link)
    os.mkdir("/tmp")
    options = f"mode=1777,size={config['disk_bytes']},nr_inodes={INODES}"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    call("umount2", b"/.host", MNT_DETACH)
    os.rmdir("/.host")
    make_read_only("/")
    os.chdir("/tmp")


def give_up_privileges(uid: int | None) -> None:
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call("capset", struct.pack("=Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    call("prctl", PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3)
    filter_system_calls()


class FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_system_calls() -> None:
    """A seccomp filter: DENIED calls fail with EPERM, so do new namespaces and all sockets but local ones.

    clone3, whose flags a filter can't see, does not exist; the C library then uses clone.
    """
    column = list(AUDIT_ARCH).index(os.uname().machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM, 0x00050000 | ENOSYS
    number, architecture, first_argument = 0, 4, 16

    program = [
        (load, 0, 0, architecture),
        (equal, 1, 0, AUDIT_ARCH[os.uname().machine]),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),  # the x32 calls of x86_64
        (give, 0, 0, deny),
        (equal, 0, 1, CLONE3[column]),
        (give, 0, 0, missing),
    ]
    for numbers in DENIED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, deny)]
    program += [
        (equal, 0, 4, CLONE[column]),
        (load, 0, 0, first_argument),
        (any_bit, 0, 1, NAMESPACES | CLONE_NEWUSER),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    for numbers in SOCKETS:
        program += [
            (equal, 0, 4, numbers[column]),
            (load, 0, 0, first_argument),
            (equal, 1, 0, AF_UNIX),
            (give, 0, 0, deny),
            (give, 0, 0, allow),
        ]
    program.append((give, 0, 0, allow))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(FilterProgram(len(program), code)))


def read_program() -> bytes:
    length = int.from_bytes(read_exactly(8), "big")
    return read_exactly(length)


def read_exactly(length: int) -> bytes:
    parts = []
    while length:
        part = os.read(0, min(length, 1 << 20))
        if not part:
            raise OSError("the caller has ended")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def set_limits(config: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: config["cpu_seconds"],
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["disk_bytes"],
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
    }
    if config["isolated"]:  # elsewhere the user's other processes would count
        ours = 2 if config["namespaces"] and config["uid"] is None else 1  # launchers in the same user namespace
        limits[resource.RLIMIT_NPROC] = config["processes"] + ours
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def run_script(config: dict[str, Any], source: bytes) -> None:
    """Replace this process by the program."""
    path = os.path.join(os.getcwd(), "program.py")
    with open(path, "wb") as file:
        file.write(source)
    python = config["python"]
    arguments = [python, "-s", "-S", "-P", "-B", "-X", "utf8", path]
    os.execve(python, arguments, {"PYTHONHASHSEED": "0"})


def run_module(config: dict[str, Any], payload: bytes) -> int:
    """Run `main` of the last of the given modules; returns the exit code."""
    for descriptor in (config["status_fd"], config["info_fd"]):
        with contextlib.suppress(OSError):  # closed already, or bubblewrap's
            os.close(descriptor)
    modules, arguments = marshal.loads(payload)
    for name, code in modules:
        module = sys.modules[name] = type(sys)(name)
        exec(code, module.__dict__)
    return module.main(*config["channel"], *arguments)


def run(config: dict[str, Any]) -> int:
    """Returns the exit code of the program, or minus the signal that killed it."""
    os.umask(0o022)
    os.set_inheritable(config["status_fd"], False)
    if config["namespaces"]:
        enter_namespaces(config)
    if config["isolated"]:
        give_up_privileges(config["uid"])
    call("prctl", PR_SET_DUMPABLE, *[ctypes.c_ulong(0)] * 4)  # others of our user id may not read our memory
    program = read_program()
    child = os.fork()
    if not child:
        code = 127
        try:
            set_limits(config)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            if config["channel"]:
                code = run_module(config, program)
            else:
                run_script(config, program)
        except BaseException:
            sys.__excepthook__(*sys.exc_info())
        os._exit(code)
    for descriptor in config["channel"]:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(wait_for(child))


def wait_for(child: int) -> int:
    """The child's wait status. Reaps what the program orphans too, and exits if the caller dies."""
    ended = os.pidfd_open(child)
    while True:
        if 0 in select.select([0, ended], [], [], 0.1)[0]:
            os.killpg(0, signal.SIGKILL)  # enough without a namespace; inside one, the first process outlives this
            os._exit(1)
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if found[0] == child:
                return found[1]


def main() -> None:
    config = marshal.loads(binascii.a2b_base64(sys.argv[2]))
    try:
        report = f"exit {run(config)}"
    except Exception as error:
        report = f"error {error or type(error).__name__}"
    os.write(config["status_fd"], report.encode(errors="replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
