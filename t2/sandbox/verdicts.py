"""Tests of untrusted programs: each program runs in one sandbox and its tests in another."""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from t2.sandbox.runner import Limits, judge_with, run_each

CHECK = re.compile(r"^def\s+check\s*\(", re.MULTILINE)


@dataclass(frozen=True)
class Test:
    """An untrusted program, and the trusted tests that it has to pass.

    program: defines the functions that the tests call.
    tests: Python that raises an exception where the program is wrong. A name that it uses without defining it is a
        function of the program, unless it is a builtin, the prelude's, or a module of the standard library.
    prelude: trusted code before the tests, such as the helpers and imports of a prompt. The tests use these, whatever
        the program makes of the same names.
    functions: names that are functions of the program even where a builtin or the prelude has the name.
    """

    __test__ = False  # for pytest

    program: str
    tests: str
    prelude: str = ""
    functions: tuple[str, ...] = ()

    @classmethod
    def split(cls, text: str) -> Test:
        """A test from one text: the tests start at its last line `def check(`.

        Safe only if the trusted tests define `check`, since a program that defines it last would be taken for its own
        judge. Whoever knows the parts passes them to `Test`.

        Raises:
            ValueError: no line starts with `def check(`.
        """
        found = list(CHECK.finditer(text))
        if not found:
            raise ValueError("expected tests that start with a line 'def check('; pass others as Test(program, tests)")
        start = found[-1].start()
        tests = text[start:]
        return cls(text[:start], tests, functions=tuple(_checked(tests)))


def run_tests(
    tests: Sequence[Test | str],
    limits: Limits | None = None,
    *,
    parallel: int | None = None,
    allow_unsandboxed: bool = False,
) -> list[bool]:
    """Whether each program passes its tests.

    A program can't fake it: the tests run in a process and a sandbox of their own, the *judge*, that the program can't
    see. They call the program's functions over a pipe that carries data only. Arguments and results are copies, built
    from exact builtin types (`t2.sandbox.wire`), so the program's objects take no part in a comparison. Exceptions
    arrive as the builtin exceptions below them. A program fails if it ends before the tests do, breaks the protocol,
    or returns an object that does not travel, such as one of its own classes or a function. Tests can't pass it
    functions, and don't see changes that it makes to its arguments.

    Args:
        tests: programs with their tests; a string is split by `Test.split`.
        limits: of each program and, in its own sandbox, of each judge.
        parallel: how many at a time; default: one for each processor.
        allow_unsandboxed: as in `run_program`. Program and judge are then two processes of this user, and a program
            that attacks the other one is not stopped.

    Raises:
        SandboxUnavailable: nothing isolates programs here, and `allow_unsandboxed` is not set.
        SandboxError: the sandbox could not be set up this time.
        ValueError: a string lacks a line `def check(`.
    """
    limits = limits or Limits()
    if isinstance(tests, str):
        raise TypeError("tests: expected a list, got one string")
    for index, test in enumerate(tests):
        if not isinstance(test, Test | str):
            raise TypeError(f"test {index}: expected a Test or a string, got {type(test).__name__}")
    parts = [Test.split(test) if isinstance(test, str) else test for test in tests]

    def judge(name: str, test: Test) -> bool:
        return judge_with(name, test.program, _arguments(test.prelude, test.tests, test.functions), limits)

    return run_each(judge, parts, parallel, allow_unsandboxed)


@functools.lru_cache(maxsize=1024)
def _arguments(prelude: str, tests: str, functions: tuple[str, ...]) -> tuple[str, str, tuple[str, ...], list[str]]:
    """The prelude, the tests, names that are the program's, and names that are if the prelude lacks them."""
    used = _names_used(tests) - set(functions)
    ours, complete = _names_bound(prelude)
    free = {name for name in used - ours if not hasattr(builtins, name)}
    modules = {name for name in _bases(tests) & free if complete and name in sys.stdlib_module_names}
    if complete and not used & ours:
        prelude = ""  # such as `from typing import List`, which takes time
    prelude = "".join([*(f"import {name}\n" for name in sorted(modules)), prelude])
    return prelude, tests, functions, sorted(free - modules)


def _names_used(code: str) -> set[str]:
    """Names that a module uses and does not define; none if it is no Python."""
    try:
        module = symtable.symtable(code, "<tests>", "exec")
    except (SyntaxError, ValueError):
        return set()
    own = {symbol.get_name() for symbol in module.get_symbols() if _is_bound(symbol)}
    return {
        symbol.get_name()
        for table in _tables(module)
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (table is module or symbol.is_global())
    } - own


def _names_bound(code: str) -> tuple[set[str], bool]:
    """Names that a module defines, and whether these are all: not if it has `import *` or is no Python."""
    try:
        module = symtable.symtable(code, "<prelude>", "exec")
    except (SyntaxError, ValueError):
        return set(), False
    every = not re.search(r"^from\s.*import\s*\*", code, re.MULTILINE)
    return {symbol.get_name() for symbol in module.get_symbols() if _is_bound(symbol)}, every


def _is_bound(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _bases(code: str) -> set[str]:
    """Names x of expressions x.y."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError):
        return set()
    return {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}


def _checked(code: str) -> Iterator[str]:
    """Names that a module passes to `check`."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError):
        return
    for statement in statements:
        match statement:
            case ast.Expr(ast.Call(ast.Name("check"), arguments)):
                yield from (each.id for each in arguments if isinstance(each, ast.Name))
