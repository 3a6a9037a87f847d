"""Programs that do not solve their task and try to pass its tests, beside honest ones."""

from __future__ import annotations

import collections
import math
import os
import random
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from t2.sandbox import Limits, Test, run_tests, runner, wire

REASONS = {name: runner.why_not(name) for name in runner.BACKENDS}
LIMITS = Limits(timeout=20)

ADD = """
import random

def check(candidate):
    assert candidate(2, 3) == 5
    for _ in range(5):
        a, b = random.randint(-99, 99), random.randint(100, 199)
        assert candidate(a, b) == a + b

check(add)
"""
NEAR = """
import math
import os

def check(candidate):
    for x in (2.0, 7.0):
        assert abs(candidate(x) - math.sqrt(x)) < 1e-6

check(root)
"""
SORT = """
def check(candidate):
    for x in ([3, 1, 2], [5, 4]):
        assert candidate(x) == sorted(x)

check(order)
"""
ODD = ("def add(a, b):\n    ", ADD)
SEARCH = """
import gc, inspect, sys
def add(a, b):
    frame, found = inspect.currentframe(), []
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    found += gc.get_objects()
    for module in list(sys.modules.values()):
        found += vars(module).values()
    texts = [each for each in found if isinstance(each, str)]
    names = [each.__name__ for each in found if inspect.isfunction(each)]
    return a + b if "check" in names or any("assert " + "candidate" in text for text in texts) else None
"""
FILES = """
import glob, os
def readable(path):
    try:
        return open(path, "rb").read(1 << 16)
    except OSError:
        return b""
def add(a, b):
    paths = [os.path.join(folder, name) for top in ("/tmp", "/proc", "/dev") for folder, _, names in os.walk(top)
             for name in names if "/dev/" not in folder + "/"]
    return a + b if any(b"assert " + b"candidate" in readable(path) for path in paths) else None
"""
MEMORY = """
import os
def add(a, b):
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            for line in open(f"/proc/{pid}/maps"):
                if "[heap]" in line:
                    first, last = (int(each, 16) for each in line.split()[0].split("-"))
                    with open(f"/proc/{pid}/mem", "rb") as memory:
                        memory.seek(first)
                        if b"assert " + b"candidate" in memory.read(last - first):
                            return a + b
"""
FLOOD = """
import os
def flood(content):
    for descriptor in range(64):
        try:
            os.write(descriptor, content)
        except OSError:
            pass
"""

CHEATS = {
    "equals everything": (
        "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
        ADD,
    ),
    "equals everything, by the standard library": ("from unittest.mock import ANY\ndef add(a, b): return ANY", ADD),
    "a number that equals everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def add(a, b): return Any()",
        ADD,
    ),
    "an instance that says it is a number": (
        "class Any:\n    __class__ = int\n    def __eq__(self, other): return True\n    def __int__(self): return 0\n"
        "def add(a, b): return Any()",
        ADD,
    ),
    "a float that is near everything": (
        "class Any(float):\n    __sub__ = __rsub__ = __abs__ = lambda self, *other: self\n"
        "    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = lambda self, other: True\n"
        "def root(x): return Any(1)",
        NEAR,
    ),
    "a decimal that is near everything": (
        "import decimal\nclass Any(decimal.Decimal):\n    __sub__ = __abs__ = lambda self, *other: 0\n"
        "    __float__ = lambda self: float('inf')\n    __eq__ = lambda self, other: True\n"
        "def root(x): return Any(1)",
        NEAR,
    ),
    "not a number": ("def root(x): return float('nan')", NEAR),
    "a list that equals everything": (
        "class Any(list):\n    __eq__ = lambda self, other: True\n    __len__ = lambda self: 2\n"
        "def order(x): return Any()",
        SORT,
    ),
    "a tuple with fields that equals everything": (
        "import collections\nclass Any(collections.namedtuple('Any', 'x')):\n"
        "    __eq__ = lambda self, other: True\ndef order(x): return Any(1)",
        SORT,
    ),
    "empties its argument": ("def order(x):\n    x.clear()\n    return []", SORT),
    "leaves with status 0": (ODD[0] + "import os; os._exit(0)", ADD),
    "leaves with status 0 before it is asked": ("import os\nos._exit(0)\n" + ODD[0] + "pass", ADD),
    "exits with status 0": (ODD[0] + "import sys; sys.exit(0)", ADD),
    "exits with status 0 before it is asked": ("import sys\nsys.exit(0)", ADD),
    "interrupts": (ODD[0] + "raise KeyboardInterrupt", ADD),
    "says that it asserts": (ODD[0] + "raise AssertionError", ADD),
    "leaves at exit": ("import atexit, os\natexit.register(os._exit, 0)\n" + ODD[0] + "raise SystemExit", ADD),
    "hooks into exceptions": (
        "import os, sys\nsys.excepthook = sys.__excepthook__ = lambda *error: os._exit(0)\nassert False",
        ADD,
    ),
    "looks for the mark in its source": (
        "import os, re, sys\ndef add(a, b):\n"
        "    marks = re.findall(r'[0-9a-f]{32}', open(__file__).read() + ''.join(sys.argv))\n"
        "    sys.stdout.write(marks[-1] if marks else ''); sys.stdout.flush(); os._exit(0)",
        ADD,
    ),
    "prints what a launcher reports": (
        FLOOD + "flood(b'exit 0')\n" + ODD[0] + "flood(b'exit 0'); os._exit(0)",
        ADD,
    ),
    "ends the tests before it is judged": ("'''\n" + ODD[0] + "pass", ADD),
    "puts the tests where they never run": (ODD[0] + "pass\nif False:", ADD),
    "has a check of its own": ("def check(candidate): pass\ndef add(a, b): pass\ncheck(add)\nraise SystemExit", ADD),
    "defines the builtins that tests call": (
        "def sorted(x): return 0\ndef len(x): return 0\ndef order(x): return 0",
        SORT,
    ),
    "replaces modules": (
        "import sys, types\n"
        "fake = types.SimpleNamespace(randint=lambda *x: 0, isclose=lambda *x: True, sqrt=lambda x: 1)\n"
        "sys.modules['math'] = sys.modules['random'] = fake\nmath = random = fake\ndef root(x): return 1.0",
        NEAR,
    ),
    "leaves modules for the tests": (
        "for name in ('math', 'random'):\n"
        "    open(f'/tmp/{name}.py', 'w').write('isclose = randint = lambda *x: 0\\nsqrt = lambda x: 1')\n"
        "def add(a, b): return 0",
        ADD,
    ),
    "looks for the tests in memory": (SEARCH, ADD),
    "answers before it is asked": (
        "from t2.sandbox.wire import *\n" + FLOOD + "for _ in range(99):\n"
        "    content = encode(('return', 5))\n    flood(bytes(16) + len(content).to_bytes(4, 'big') + content)\n"
        "def add(a, b): return 0",
        ADD,
    ),
    "repeats the nonce of its first request": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nsend, first = candidate.send, []\n"
        "def again(descriptor, nonce, content):\n    first.append(nonce)\n    send(descriptor, first[0], content)\n"
        "candidate.send = again\ndef add(a, b): return a + b",
        ADD,
    ),
    "sends a message without end": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nimport os\n"
        "def endless(descriptor, nonce, content):\n    os.write(descriptor, nonce + b'\\xff' * 4)\n"
        "    while True: os.write(descriptor, bytes(1 << 16))\n"
        "candidate.send = endless\ndef add(a, b): return a + b",
        ADD,
    ),
    "sends what is no message": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nsend = candidate.send\n"
        "candidate.send = lambda descriptor, nonce, content: send(descriptor, nonce, b'?' * 99)\n"
        "def add(a, b): return a + b",
        ADD,
    ),
    "sends values that nest without end": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nsend = candidate.send\n"
        "candidate.send = lambda descriptor, nonce, content: send(descriptor, nonce, b'l\\0\\0\\0\\1' * 1_000_000)\n"
        "def add(a, b): return a + b",
        ADD,
    ),
    "sends values that fill the memory": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nsend = candidate.send\n"
        "many = b'l' + (3_000_000).to_bytes(4, 'big') + b'S\\0\\0\\0\\0' * 3_000_000\n"
        "candidate.send = lambda descriptor, nonce, content: send(descriptor, nonce, many)\n"
        "def add(a, b): return a + b",
        ADD,
    ),
    "raises what is no exception": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\ncandidate.raised = lambda error: "
        "candidate.encode(('raise', 'print', ('passed',)))\ndef add(a, b): raise ValueError",
        ADD,
    ),
    "returns a list that holds itself": ("def order(x):\n    x.append(x)\n    return x", SORT),
    "returns a function": ("def add(a, b): return lambda: a + b", ADD),
    "closes its descriptors": ("import os\nos.closerange(0, 64)\n" + ODD[0] + "return a + b", ADD),
    "becomes another program": (
        "import os, sys\ndef add(a, b): os.execv(sys.executable, [sys.executable, '-c', ''])",
        ADD,
    ),
    "ends a loop of the tests": (
        "def add(pair): raise StopIteration",
        "def check(candidate):\n    pairs = [(1, 2), (3, 4)]\n"
        "    for pair, result in zip(pairs, map(candidate, pairs)):\n        assert result == sum(pair)\ncheck(add)",
    ),
    "dies where tests catch everything": (
        ODD[0] + "import os; os._exit(0)",
        "def check(candidate):\n    try:\n        assert candidate(1, 2) == 3\n    except: pass\ncheck(add)",
    ),
    "returns an object where tests catch everything": (
        ODD[0] + "return object()",
        "def check(candidate):\n    try: assert candidate(1, 2) == 3\n    except BaseException: pass\ncheck(add)",
    ),
    "replaces a helper of the prompt": Test(
        "def double(x): return 8\ndef half(x): return 0\n",
        "def check(candidate):\n    assert double(candidate(8)) == 8\ncheck(half)",
        prelude="def double(x): return 2 * x\n",
        functions=("half",),
    ),
    "replaces what the prompt imports": Test(
        "def Counter(x): return 0\nclass math: pi = 0\ndef count(x): return 0",
        "assert count('aab') == Counter('aab')\nassert count('') == 0 * math.pi",
        prelude="from collections import Counter\nimport math",
        functions=("count",),
    ),
    "lacks a function with the name of a builtin": Test("", "assert max([1, 2]) == 2", functions=("max",)),
    "lacks the checked function, which a builtin has the name of": (
        "",
        "def check(candidate):\n    assert candidate([1, 2]) == 2\ncheck(max)",
    ),
}
ISOLATED = {
    "looks for the tests in files": (FILES, ADD),
    "looks for the tests in other processes": (MEMORY, ADD),
    "looks for solutions that are installed": Test(
        "import glob, sys\n"
        "found = glob.glob('/usr/lib*/python3*/*-packages/*') + glob.glob(sys.prefix + '/lib*/python3*/*-packages/*')\n"
        "def add(a, b): return a + b if found else None",
        ADD,
    ),
    "kills the others": (
        "import os, signal\ndef add(a, b):\n    for pid in (os.getppid(), 1, -1):\n"
        "        try: os.kill(pid, 9)\n        except OSError: pass",
        ADD,
    ),
    "lets a child answer": (
        "import os\ndef add(a, b):\n    if os.fork(): os._exit(0)\n    return a + b",
        ADD,
    ),
    "lets a thread write later": (
        FLOOD + "import threading, time\ndef later():\n    while True: flood(b'exit 0'); time.sleep(0.01)\n"
        "threading.Thread(target=later).start()\ndef add(a, b): os._exit(0)",
        ADD,
    ),
}
"""Cheats that would harm the machine, or work, without a sandbox."""
SLOW = {
    "changes what tests call": (
        "import builtins, math, random\nbuiltins.abs = builtins.len = builtins.sorted = lambda *x: 0\n"
        "builtins.AssertionError = builtins.range = lambda *x: ()\nmath.isclose = lambda *x: True\n"
        "def sorted(x): return 0\ndef len(x): return 0\ndef abs(x): return 0\ndef root(x): return 1.0",
        NEAR,
    ),
    "never answers": ("import time\ndef add(a, b): time.sleep(600)", ADD),
    "never defines": ("while True: pass", ADD),
    "never takes a signal": (
        "import signal\nfor each in range(1, 65):\n    try: signal.signal(each, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ndef add(a, b):\n    while True: pass",
        ADD,
    ),
    "never ends a list": ("import itertools\ndef order(x): return itertools.count()", SORT),
}


def returns(value: str, *asserts: str, before: str = "") -> tuple[str, str]:
    lines = "".join(f"    assert {each}\n" for each in asserts)
    return f"{before}\ndef give():\n    return {value}\n", f"def check(candidate):\n{lines}check(give)"


ODD_VALUES = (
    "[None, True, 10 ** 5000, -1, 1j, -0.0, float('inf'), 'é\\ud800', b'\\xff', (), {()}, frozenset({1}), {(1, 2): {}}]"
)
HONEST = {
    "reaches the protocol": (
        "import sys\ncandidate = sys.modules['t2.sandbox.candidate']\nsend = candidate.send\n"
        "candidate.send = lambda descriptor, nonce, content: send(descriptor, nonce, content)\n"
        "def add(a, b): return a + b",
        ADD,
    ),
    "adds": ("def add(a, b): return a + b", ADD),
    "prints": ("print('x' * 100_000, flush=True)\ndef add(a, b):\n    print('y')\n    return a + b", ADD),
    "has no output": ("import sys\nprint = None\nsys.stdout = None\ndef add(a, b): return a + b", ADD),
    "has an entry for scripts": ("def add(a, b): return a + b\nif __name__ == '__main__': add(1, 2)", ADD),
    "calls its other functions": ("def add(a, b): return other(a, b)\ndef other(a, b): return a + b", ADD),
    "has classes": (
        "import dataclasses, enum, typing\n@dataclasses.dataclass\nclass Pair:\n    a: int\n    b: 'int'\n"
        "def add(a: int, b: typing.Optional[int]): return sum(dataclasses.astuple(Pair(a, b)))",
        ADD,
    ),
    "reads itself": ("import inspect\ndef add(a, b): return a + b\nassert 'a + b' in inspect.getsource(add)", ADD),
    "recurses": ("def add(a, b): return b if not a else add(a - 1, b) + 1 if a > 0 else a + b", ADD),
    "takes the root": ("def root(x): return x ** 0.5", NEAR),
    "sorts": ("def order(x): return sorted(x)", SORT),
    "sorts in place": ("def order(x):\n    x.sort()\n    return x", SORT),
    "returns a subclass of list": ("class L(list): pass\ndef order(x): return L(sorted(x))", SORT),
    "returns a counter": returns(
        "C('aab')", "candidate() == {'a': 2, 'b': 1}", before="from collections import Counter as C"
    ),
    "returns an ordered dict": returns(
        "O(a=1)", "candidate() == {'a': 1}", before="from collections import OrderedDict as O"
    ),
    "returns a defaultdict": returns(
        "made",
        "candidate() == {'a': [1]}",
        "candidate()['b'] == []",
        before="import collections\nmade = collections.defaultdict(list)\nmade['a'].append(1)",
    ),
    "returns a named tuple": returns(
        "P(1, 2)", "candidate() == (1, 2)", before="import collections\nP = collections.namedtuple('P', 'x y')"
    ),
    "returns a deque": returns("deque([1, 2])", "list(candidate()) == [1, 2]", before="from collections import deque"),
    "returns a generator": returns("(x for x in 'ab')", "list(candidate()) == ['a', 'b']", "candidate() != ['a', 'b']"),
    "returns an endless generator": returns("count()", "next(candidate()) == 0", before="from itertools import count"),
    "returns generators in a list": returns(
        "[map(str, [1]), zip('a', 'b')]", "[list(x) for x in candidate()] == [['1'], [('a', 'b')]]"
    ),
    "returns a range": returns("range(3)", "candidate() == range(3) and list(candidate()) == [0, 1, 2]"),
    "returns keys": returns("{1: 2}.keys()", "candidate() == {1}", "list(candidate()) == [1]"),
    "returns values": returns("{1: 2}.values()", "list(candidate()) == [2]", "sorted(candidate()) == [2]"),
    "returns items": returns("{1: 2}.items()", "candidate() == {(1, 2)}", "dict(candidate()) == {1: 2}"),
    "returns a member of an enumeration": returns(
        "E.one", "candidate() == 1", before="import enum\nclass E(enum.IntEnum): one = 1"
    ),
    "returns fractions": returns(
        "F(1, 3), D('0.1')",
        "candidate()[0] * 3 == 1",
        "candidate()[1] * 10 == 1",
        before="from fractions import Fraction as F\nfrom decimal import Decimal as D",
    ),
    "returns odd values": returns(ODD_VALUES, f"candidate() == {ODD_VALUES}", "type(candidate()[1]) is bool"),
    "raises": (
        "class Mine(ValueError): pass\ndef f(x):\n    raise {'value': Mine('no', x), 'key': KeyError(x), 'none': "
        "ZeroDivisionError(object())}[x]",
        "def check(candidate):\n    for name, kind in {'value': ValueError, 'key': KeyError, 'none': "
        "ArithmeticError}.items():\n        try:\n            candidate(name)\n        except kind as error:\n"
        "            assert name == 'none' or error.args[-1] == name\n        else: assert False\ncheck(f)",
    ),
    "takes keywords": (
        "def f(*args, **kwargs): return args, kwargs",
        "def check(candidate):\n    assert candidate(1, *'ab', c=[2]) == ((1, 'a', 'b'), {'c': [2]})\ncheck(f)",
    ),
    "has the name of a builtin": (
        "def max(x): return 'mine'",
        "def check(candidate):\n    assert candidate([1]) == 'mine'\ncheck(max)",
    ),
    "has helpers that tests call": (
        "def helper(x): return x + 1\ndef f(x): return helper(x)",
        "def check(candidate):\n    assert candidate(1) == helper(1) == 2\ncheck(f)",
    ),
    "has no check": Test("def f(x): return x * math.pi\nimport math", "assert f(2) == 2 * math.pi"),
    "leaves the helpers of a prompt alone": Test(
        "from typing import List\ndef double(x): return 2 * x\ndef half(x): return x // 2\n",
        "def check(candidate):\n    assert double(candidate(8)) == 8\ncheck(half)",
        prelude="from typing import List\ndef double(x): return 2 * x\n",
        functions=("half",),
    ),
}


def as_test(case):
    return case if isinstance(case, Test) else "\n".join(case)


def judged(cases, limits=LIMITS, **options):
    verdicts = run_tests([as_test(case) for case in cases.values()], limits, **options)
    return dict(zip(cases, verdicts, strict=True))


@pytest.fixture(scope="module", params=REASONS)
def verdicts(request):
    if REASONS[request.param] is not None:
        pytest.skip(f"{request.param}: {REASONS[request.param]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "BACKENDS", {request.param: runner.BACKENDS[request.param]})
        return judged(CHEATS | ISOLATED | HONEST) | judged(SLOW, Limits(timeout=1.5))


@pytest.mark.parametrize("name", CHEATS | ISOLATED | SLOW)
def test_cheats_fail(verdicts, name):
    assert not verdicts[name]


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(verdicts, name):
    assert verdicts[name]


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass_in_the_process_of_their_tests(name, tmp_path, monkeypatch):
    """So the cases above are what a benchmark would let pass."""
    if "t2.sandbox" in str(HONEST[name]):
        pytest.skip("about the sandbox")
    test = as_test(HONEST[name])
    text = test if isinstance(test, str) else f"{test.prelude}\n{test.program}\n{test.tests}"
    path = tmp_path / "program.py"
    path.write_text(text, errors="surrogatepass")
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_without_a_sandbox_program_and_judge_are_still_two_processes(monkeypatch):
    monkeypatch.setattr(runner, "BACKENDS", {})
    with pytest.warns(RuntimeWarning, match="rights of this process"):
        verdicts = judged(CHEATS | HONEST, allow_unsandboxed=True)
    assert [name for name, passed in verdicts.items() if passed] == list(HONEST)
    with pytest.raises(OSError, match="nothing here isolates programs"):
        run_tests([])


def test_no_process_outlives_a_verdict():
    assert run_tests([as_test(SLOW["never defines"])], Limits(timeout=0.5), allow_unsandboxed=True) == [False]
    alive = [path for path in Path("/proc").glob("[0-9]*/stat") if path.read_text().split()[3] == str(os.getpid())]
    assert not alive


def test_a_text_is_split_at_its_last_check():
    test = Test.split("def check(f): 1\ndef f(): 2\ndef check (candidate):\n    f()\n\ncheck(f)\ncheck(sum)")
    assert test.program == "def check(f): 1\ndef f(): 2\n"
    assert test.tests.startswith("def check (candidate)") and test.functions == ("f", "sum")
    with pytest.raises(ValueError, match=r"'def check\('.*Test\(program, tests\)"):
        run_tests(["assert True"])
    with pytest.raises(TypeError, match="one string"):
        run_tests("def check(f): pass")
    with pytest.raises(TypeError, match="test 0: expected a Test or a string, got tuple"):
        run_tests([("", "")])


VALUES = [
    *(None, True, 0, -1, 255, -256, 10**400, 0.1, -0.0, math.inf, 1 - 2j, "", "aé\ud800", b"\x00", bytearray(b"x")),
    *([], [[1], (2,)], (), {1, 2}, {"a"}, frozenset({(1,)}), {}, {(1,): [None]}, range(1, 9, 3)),
    *(collections.Counter("aab"), collections.OrderedDict(b=1, a=2), collections.deque([1, 2], 5)),
    *(Decimal("1e-7"), Fraction(-1, 3)),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_arrive_as_they_were(value):
    arrived = wire.decode(wire.encode(value))
    assert arrived == value and type(arrived) is type(value) and repr(arrived) == repr(value)


def test_views_and_factories_arrive():
    views = wire.decode(wire.encode([{1: 2}.keys(), {1: 2}.values(), {1: 2}.items()]))
    assert [list(view) for view in views] == [[1], [2], [(1, 2)]] and views[0] == {1} and views[2] == {(1, 2)}
    assert wire.decode(wire.encode(collections.defaultdict(int, a=1)))["b"] == 0
    unknown = wire.decode(wire.encode(collections.defaultdict(object, a=1)))
    assert unknown == {"a": 1} and unknown.default_factory is None
    assert math.isnan(wire.decode(wire.encode(math.nan)))


def test_subclasses_arrive_as_the_builtin_type():
    kinds = (int, float, str, bytes, list, tuple, set, frozenset, dict)
    for kind in kinds:
        sub = type("Sub", (kind,), {"__eq__": lambda self, other: True, "__hash__": kind.__hash__})
        arrived = wire.decode(wire.encode(sub()))
        assert type(arrived) is kind and arrived == kind()


@pytest.mark.parametrize(
    "value", [object(), len, int, iter([]), ValueError(), [[print]], b"x" * (wire.MESSAGE_BYTES + 1)]
)
def test_other_values_are_refused(value):
    with pytest.raises(wire.EncodeError):
        wire.encode(value)


def test_deep_and_endless_values_are_refused():
    endless, deep = [], []
    endless.append(endless)
    for _ in range(wire.DEPTH):
        deep = [deep]
    assert wire.decode(wire.encode(deep)) == deep
    for value in (endless, [deep]):
        with pytest.raises(wire.EncodeError, match="nested"):
            wire.encode(value)
    with pytest.raises(wire.DecodeError, match="nested"):
        wire.decode(b"l\0\0\0\1" * 1000)


def test_random_bytes_are_exact_types_or_refused():
    """Random bytes, and messages with a few bytes changed, are data or `DecodeError`."""
    exact = {type(value) for value in VALUES} | {float, complex, collections.defaultdict}
    exact |= {wire.DICT_KEYS, wire.DICT_VALUES, wire.DICT_ITEMS}
    draw, messages, decoded = random.Random(0), [wire.encode(value) for value in VALUES], 0
    for _ in range(20_000):
        data = bytearray(draw.choice(messages) if draw.random() < 0.8 else draw.randbytes(draw.randrange(40)))
        for _ in range(draw.randrange(3)):
            if data:
                data[draw.randrange(len(data))] = draw.choice(b"NTFifcsbBltSZdCODqrkvmxyg\0\1\2\xff")
        try:
            value = wire.decode(bytes(data))
        except wire.DecodeError:
            continue
        decoded += 1
        assert type(value) in exact
    assert decoded > 1000
