"""Commands, options, Python names, files and links that the documentation mentions exist."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tyro

import t2
from t2.cli.app import COMMANDS
from t2.eval.spec import parse_spec

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "t2" / "banks").glob("*/README.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FOLDERS = "benchmarks|csrc|docs|examples|t2|t2kernels|tests"


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced shell blocks and of indented blocks, with continued lines joined."""
    fence, pending = None, ""
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fence = line.strip().removeprefix("```") or "text" if fence is None else None
            continue
        if fence in ("bash", "sh") or (fence is None and line.startswith("    ")) or pending:
            pending += line.strip() + "\n"
            try:
                shlex.split(pending, comments=True)
            except ValueError:  # an open quotation, or a backslash at the end
                continue
            if not pending.endswith("\\\n"):
                yield pending
                pending = ""


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `t2 ...` line."""
    for line in code_lines(text):
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if words[:3] == ["python", "-m", "t2"]:
            words = words[2:]
        if words[:1] == ["t2"]:
            yield words[1:]


def parse(arguments: list[str]) -> None:
    """Parse as the command line does, without running the command."""
    run = import_module(f"t2.cli.{arguments[0]}").run

    @functools.wraps(run)
    def parsed(*args: object, **kwargs: object) -> None: ...

    tyro.cli(parsed, args=arguments[1:])


@pages
def test_commands_parse(page, capsys):
    for arguments in commands(page.read_text()):
        if arguments[0].startswith("--"):
            assert arguments[0].startswith("--tyro-") or arguments[0] in ("--version", "--help")
            continue
        assert arguments[0] in COMMANDS, arguments
        try:
            parse(arguments)
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"t2 {shlex.join(arguments)}\n{capsys.readouterr().err}")


@functools.cache
def options(command: str) -> set[str]:
    """The options of a command, as its help names them."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        parse([command, "--help"])
    return set(re.findall(r"--[a-z0-9][\w-]*", text.getvalue()))


@pages
def test_options_in_the_text_exist(page):
    every = {"--options"}.union(*map(options, COMMANDS))
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        words = code.split()
        known = every
        if words[0] == "t2" and len(words) > 1 and not words[1].startswith("--"):
            if words[1] == "COMMAND" or words[1] == "...":
                continue
            assert words[1] in COMMANDS, code
            known = options(words[1]) | {"--help"}
        elif not words[0].startswith("--") or words[0].startswith("--tyro"):
            continue
        for word in words:
            if word.startswith("--"):
                option = word.partition("=")[0].strip(",.")
                assert option in known, f"{code}: no option {option}"


def resolves(name: str) -> bool:
    """Whether a dotted name leads to a module, an attribute or a dataclass field."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if is_dataclass(found) and part in {field.name for field in fields(found)}:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pages
def test_names_exist(page):
    text = re.sub(r"https?://\S+", "", page.read_text())
    for name in set(re.findall(r"(?<![\w./-])(t2(?:kernels)?(?:\.[A-Za-z_]\w*)+)", text)):
        assert resolves(name) or name.endswith(".md"), name


@pages
def test_model_methods_exist(page):
    source = inspect.getsource(t2.SVFModel)
    for name in set(re.findall(r"\b(?:svf|SVFModel)\.([a-z]\w*)", page.read_text())):
        assert hasattr(t2.SVFModel, name) or f"self.{name}" in source or name == "model", name


@pages
def test_files_exist(page):
    text = re.sub(r"<!--.*?-->|https?://\S+", "", page.read_text())
    for path in set(re.findall(rf"(?<![\w./$~-])((?:{FOLDERS})/[\w./*-]*[\w*])(?![\w<{{-])", text)):
        assert list(ROOT.glob(path)), path


@pages
def test_modules_that_are_run_exist(page):
    for name in set(re.findall(r"python -m ([a-z0-9_.]+[a-z0-9_])", page.read_text())):
        assert find_spec(name), name


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path = link.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), link


@pages
def test_python_blocks_parse(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("t2", "t2kernels"):
                for name in node.names:
                    assert resolves(f"{node.module}.{name.name}"), ast.unparse(node)


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    asked = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"(?m)^make ([a-z-]+)", "".join(code_lines(text)))}
    assert asked <= targets


def test_the_spec_of_the_guide_has_the_defaults():
    (content,) = re.findall(r"```json\n(\{\n.*?)```", (ROOT / "docs" / "adaptation.md").read_text(), re.DOTALL)
    spec = json.loads(content)
    assert parse_spec(spec) == parse_spec({"seen": spec["seen"]})
