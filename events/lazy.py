"""Lazy exports (PEP 562) for the package roots: a name is imported from its module when it is first used.

Lives in the lowest room so that every package root can call it. A root lists its names twice, once under
`TYPE_CHECKING` for type checkers and once in the table; tests/test_architecture.py compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, table: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for `package`, whose exported names `table` maps to their modules.

    Use as `__getattr__, __dir__ = lazy_exports(__name__, {"Agent": "nexactor.agent", ...})`.
    """

    def get(name: str) -> Any:
        module = table.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *table})

    return get, names
