"""`--options FILE`: options of a command from a JSON file, such as the options.json of a training run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

OPTION = "--options"


def with_options_file(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with `--options FILE` replaced by the options that the file has.

    Options of the command line win over those of the file.

    Raises:
        ValueError: the option without a file, or more than once; a file that can't be read or is not a JSON object, or
            has options that the command has not, or values that no option has.
    """
    places = [i for i, word in enumerate(arguments) if word.partition("=")[0] == OPTION]
    if not places:
        return list(arguments)
    place = places[0]
    _, equals, value = arguments[place].partition("=")
    rest = [*arguments[:place], *arguments[place + (1 if equals else 2) :]]
    name = value if equals else next(iter(arguments[place + 1 :]), "")
    if len(places) > 1 or not name or name.startswith("--"):
        raise ValueError(f"options: expected one JSON file, got {' '.join(arguments[place : place + 2])}")
    path = Path(name)
    from t2kernels.files import strict_json  # imports torch, which --help does without

    try:
        given = strict_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"options: {path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object of options, got {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object of options, got {type(given).__name__}")
    known = _options(import_module(f"t2.cli.{arguments[0]}").run)
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{path}: expected options of t2 {arguments[0]}, got {', '.join(unknown)}")
    return [*rest, *_words(given, rest, path)]


def _options(run: Callable[..., Any]) -> set[str]:
    """Names of a command's options: its parameters, and the fields of those that are dataclasses."""
    names: set[str] = set()
    for name, hint in get_type_hints(run, include_extras=True).items():
        kind = next(iter(get_args(hint)), hint)
        names |= {field.name for field in fields(kind)} if is_dataclass(kind) else {name}
    return names - {"return"}


def _words(given: Mapping[str, Any], rest: Sequence[str], path: Path) -> list[str]:
    said = {word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in rest}
    words = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if name in said or value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            words += [f"--{option}", *value]
        elif isinstance(value, str | int | float):
            words.append(f"--{option}={value}")
        else:
            raise ValueError(f"{path}: {name}: expected a value that an option can have, got {json.dumps(value)}")
    return words
