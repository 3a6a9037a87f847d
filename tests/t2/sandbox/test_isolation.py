from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.tasks.sandbox import PROGRAMS, Host, attack, programs_alive
from t2.sandbox import Limits, SandboxUnavailable, backend, run_program, run_programs, runner

REASONS = {name: runner.why_not(name) for name in runner.BACKENDS}
isolating = pytest.mark.skipif(all(REASONS.values()), reason=f"nothing isolates here: {REASONS}")


@pytest.fixture(scope="module")
def host():
    with Host() as host:
        yield host


@pytest.mark.parametrize("hostile", PROGRAMS, ids=lambda hostile: hostile.name)
@pytest.mark.parametrize("name", REASONS)
def test_hostile_programs_come_to_nothing(name, hostile, host):
    if REASONS[name] is not None:
        pytest.skip(f"{name}: {REASONS[name]}")
    outcome = attack(name, hostile, host)
    assert not outcome.broken, (outcome.broken, outcome.result)


@isolating
def test_this_machine_isolates_by_the_first_backend_that_can():
    assert backend() == next(name for name, reason in REASONS.items() if reason is None)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to compare with")
def test_where_the_kernel_gives_namespaces_there_is_a_sandbox():
    """A launcher that no longer isolates must not pass for a machine that can't."""
    namespaces = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
    tried = subprocess.run(["unshare", *namespaces, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(tried.stderr.strip())
    assert REASONS["namespaces"] is None


@isolating
def test_results_of_well_behaved_programs():
    result = run_program("import sys\nprint('out å', input if 0 else '')\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (result.status, result.returncode, result.ok) == ("exited", 3, False)
    assert (result.stdout, result.stderr) == ("out å \n", "err\n")
    assert run_program("import json, re, decimal, sqlite3, ssl; print('fine')").ok
    assert run_program("import sys; sys.stdin.read() == '' or sys.exit(1)").ok
    assert run_program("open('a', 'w').write('x'); assert open('/tmp/a').read() == 'x'").ok


@isolating
@pytest.mark.parametrize("source", ["def f(:", "x = 'caf\udce9'", "\0", "raise SystemExit(1)", "assert False"])
def test_programs_that_fail_are_results_not_errors(source):
    result = run_program(source)
    assert result.status == "exited" and result.returncode == 1


@isolating
def test_a_signal_is_told_apart():
    result = run_program("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (result.status, result.returncode) == ("signal", -signal.SIGSEGV)


@isolating
def test_sets_of_strings_come_in_the_same_order_every_time():
    source = "print({str(i) for i in range(50)})"
    assert len({result.stdout for result in run_programs([source] * 4)}) == 1


@isolating
def test_memory_up_to_the_limit_is_there():
    limits = Limits(timeout=20, memory_bytes=256 << 20)
    assert run_program("x = bytearray(180 << 20)", limits).ok
    result = run_program("x = bytearray(300 << 20)", limits)
    assert not result.ok and "MemoryError" in result.stderr


@isolating
def test_processor_time_ends_with_the_clock_in_every_process():
    started = time.monotonic()
    burn = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    result = run_program(burn, Limits(timeout=1, processes=8))
    assert result.status == "timeout" and time.monotonic() - started < 8
    assert programs_alive() == 0


@isolating
def test_output_at_the_limit_passes_and_above_it_does_not():
    limits = Limits(timeout=10, output_bytes=1000)
    assert run_program("print('x' * 999)", limits).ok
    result = run_program("print('x' * 1000, flush=True)\nimport time; time.sleep(60)", limits)
    assert result.status == "output" and len(result.stdout) == 1000 and result.seconds < 5


@isolating
def test_programs_run_in_parallel_and_answers_keep_their_order():
    sources = [f"import time; time.sleep(1); print({i})" for i in range(4)]
    started = time.monotonic()
    results = run_programs(sources, Limits(timeout=10), parallel=4)
    assert [result.stdout for result in results] == ["0\n", "1\n", "2\n", "3\n"]
    assert time.monotonic() - started < 3.9
    assert run_programs([]) == []


@isolating
def test_programs_die_with_a_killed_caller():
    code = "from t2.sandbox import *; print(backend(), flush=True); "
    code += "run_program('import time; time.sleep(600)', Limits(timeout=600))"
    root = Path(__file__).parents[3]
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert caller.stdout.readline().strip() == backend()  # the probe, which runs programs too, is done
    wait_for(lambda: programs_alive() == 1)
    caller.kill()
    caller.communicate()
    wait_for(lambda: programs_alive() == 0)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@isolating
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without privileges already")
def test_unprivileged_users_are_isolated_too():
    """The interpreter of these tests may be root's alone, so this takes the system's."""
    python = "/usr/bin/python3"
    version = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not Path(python).exists() or subprocess.run([python, "-c", version]).returncode:
        pytest.skip(f"no {python} of 3.11 or later")
    code = """
import json
from t2.sandbox import Limits, run_program, runner
reasons = {name: runner.why_not(name) for name in runner.BACKENDS}
bomb = "import os\\nwhile True:\\n    try:\\n        os.fork()\\n    except OSError:\\n        pass"
result = run_program(bomb, Limits(timeout=1, processes=4))
print(json.dumps([reasons, result.status, run_program("import os; print(os.getuid())").stdout]))
"""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(runner.__file__).parent, Path(folder) / "t2" / "sandbox")
        os.chmod(folder, 0o755)
        run = subprocess.run(
            [python, "-c", code],
            cwd=folder,
            env={"PYTHONPATH": folder, "PATH": os.environ["PATH"]},
            user=65533,
            group=65533,
            extra_groups=[],
            capture_output=True,
            text=True,
        )
    if "nothing here isolates" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    reasons, status, user = json.loads(run.stdout)
    assert {name for name, reason in reasons.items() if reason is None} == {
        name for name, reason in REASONS.items() if reason is None
    }
    assert status == "timeout" and user == "65534\n"


def broken(config):
    return ["false"]


def liar(config):
    """Runs the program as it is, but reports like a backend."""
    script = "import os, sys; os.write(int(sys.argv[1]), b'{\"child-pid\": %d}' % os.getpid()); os.chdir(sys.argv[2]); "
    script += "os.execv(sys.argv[3], sys.argv[3:])"
    folder = tempfile.mkdtemp()
    return [sys.executable, "-c", script, str(config["info_fd"]), folder, *runner._unsandboxed(config)]


@pytest.mark.parametrize(
    ("command", "reason"), [(broken, "exit code 1"), (liar, "reads files of the host.*reaches the network")]
)
def test_refuses_where_nothing_isolates(monkeypatch, command, reason):
    monkeypatch.setattr(runner, "BACKENDS", {"tool": command})
    monkeypatch.setattr(runner, "_probed", {})
    with pytest.raises(SandboxUnavailable, match=f"tool: .*{reason}.*Install bubblewrap"):
        run_program("print('ran')")
    with pytest.warns(RuntimeWarning, match="rights of this process"):
        result = run_program("print('ran')", allow_unsandboxed=True)
    assert result.ok and result.stdout == "ran\n"
    with pytest.warns(RuntimeWarning):
        endless = run_program("while True: pass", Limits(timeout=0.5), allow_unsandboxed=True)
    assert endless.status == "timeout"


def test_the_flag_changes_nothing_where_something_isolates():
    if all(REASONS.values()):
        pytest.skip(str(REASONS))
    assert not run_program(f"open({__file__!r})", allow_unsandboxed=True).ok


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timeout": 0}, "timeout: expected seconds > 0, got 0"),
        ({"timeout": float("nan")}, "timeout"),
        ({"memory_bytes": 1 << 20}, "memory_bytes: expected an integer >= 67,108,864, got 1048576"),
        ({"output_bytes": 0}, "output_bytes"),
        ({"disk_bytes": 1.5}, "disk_bytes"),
        ({"processes": True}, "processes"),
    ],
)
def test_limits_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        Limits(**options)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="program 1: expected a string, got int"):
        run_programs(["", 3])
    with pytest.raises(TypeError, match="one string"):
        run_programs("print()")
    with pytest.raises(ValueError, match="parallel: expected an integer >= 1, got 0"):
        run_programs([""], parallel=0)
