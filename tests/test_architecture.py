"""The rooms and the direction of their imports, as docs/architecture.md states them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("events", "tools", "learner")

ALLOWED = {
    "events": {"events"},
    "tools": {"events", "tools"},
    "learner": {"events", "learner"},
    "nexactor": {"events", "tools", "nexactor"},
    "top": {"events", "tools", "learner", "nexactor", "top"},
}
"""Which layers a layer may import. `top` is nexactor/cli, nexactor/web and nexactor/__main__.py."""

HEAVY = ("jax", "torch", "transformers", "mcp", "pyarrow", "openai", "nats", "aiohttp")


def layer_of(module: str) -> str:
    """The layer of a dotted module name inside the package: `nexactor.events.log` -> `events`."""
    parts = module.split(".")
    second = parts[1] if len(parts) > 1 else ""
    if second in ROOMS:
        return second
    return "top" if second in ("cli", "web", "__main__") else "nexactor"


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package, by dotted name, through the symbolic links."""
    for folder, folders, files in os.walk(ROOT / "nexactor", followlinks=True):
        folders[:] = [f for f in folders if f != "__pycache__"]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports_of(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, anywhere in it, lazily or for types only."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=source, level=level, names=names):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                origin = ".".join([*base, source] if source else base)
                for alias in names:
                    # `from nexactor import events` imports the room, not the core.
                    yield node.lineno, f"{origin}.{alias.name}" if origin == "nexactor" else origin
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def violations(module: str, path: Path) -> list[str]:
    """What is wrong with a module's imports, one line each."""
    layer = layer_of(module)
    found = []
    for line, name in imports_of(module, path):
        first = name.split(".")[0]
        if first in ROOMS and first not in sys.stdlib_module_names:
            found.append(f"{path}:{line}: imports {name}; write nexactor.{name}")
        elif first == "nexactor" and layer_of(name) not in ALLOWED[layer]:
            found.append(f"{path}:{line}: {layer} must not import {name}")
    return found


def test_imports_point_one_way_only() -> None:
    modules = dict(sources())
    assert {layer_of(m) for m in modules} == set(ALLOWED), "every layer was looked at"
    assert [v for m, p in modules.items() for v in violations(m, p)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nexactor.events.x", "from nexactor.tools.protocol import Tool"),
        ("nexactor.events.x", "import nexactor.agent"),
        ("nexactor.tools.x", "from ..learner import model"),
        ("nexactor.tools.x", "from nexactor import Agent"),
        ("nexactor.learner.x", "def f():\n    from nexactor.tools import tool"),
        ("nexactor.learner.x", "from nexactor import node"),
        ("nexactor.agent", "import importlib\nimportlib.import_module('nexactor.learner.model')"),
        ("nexactor.agent", "from nexactor.cli.main import app"),
        ("nexactor.agent", "if TYPE_CHECKING:\n    from nexactor import learner"),
        ("nexactor.agent", "from events.log import EventLog"),
    ],
)
def test_an_import_against_the_direction_is_found(module: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(line)
    assert len(violations(module, path)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nexactor.learner.x", "from nexactor.events.log import EventLog"),
        ("nexactor.learner.x", "from nexactor import events"),
        ("nexactor.agent", "from .tools import tool"),
        ("nexactor.cli.main", "import nexactor.learner.loop"),
    ],
)
def test_an_import_along_the_direction_passes(module: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(line)
    assert violations(module, path) == []


@pytest.mark.parametrize(
    "package",
    [
        "nexactor",
        "nexactor.events",
        "nexactor.tools",
        "nexactor.learner",
        "nexactor.cli",
        "nexactor.cli.main",
    ],
)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["nexactor", "nexactor.events", "nexactor.tools", "nexactor.learner"])
def test_every_exported_name_exists_and_is_known_to_type_checkers(package: str) -> None:
    module = import_module(package)
    assert module.__file__ is not None
    table = getattr(module, "_EXPORTS", {})
    declared = {
        alias.asname or alias.name: node.module
        for block in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert table == declared
    for name, home in table.items():
        assert getattr(module, name) is getattr(import_module(home), name)
        assert name in dir(module)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import nexactor

    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        nexactor.Nonsense  # noqa: B018


def test_the_rooms_are_symbolic_links_that_git_tracks() -> None:
    for room in ROOMS:
        assert os.readlink(ROOT / "nexactor" / room) == f"../{room}"
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-s", *(f"nexactor/{room}" for room in ROOMS)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert [line.split()[0] for line in listing.stdout.splitlines()] == ["120000"] * len(ROOMS)
