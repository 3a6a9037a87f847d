"""Packages whose public names are imported when they are first used, so that importing one of them stays light."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], renamed: Mapping[str, str] = MappingProxyType({})
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        homes: the module that defines each public name; "" for the name of a submodule or subpackage.
        renamed: new names by old ones, which work with a DeprecationWarning.
    """

    def getattr_(name: str) -> Any:
        now = renamed.get(name, name)
        if now != name:
            warnings.warn(
                f"{package}.{name} is now {package}.{now}; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            name = now
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        return getattr(importlib.import_module(home), name) if home else importlib.import_module(f"{package}.{name}")

    return getattr_, lambda: sorted(homes)
