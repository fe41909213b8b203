"""Tools are found by their binding; a mistake is answered with the place and the nearest name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexactor.events.errors import ConfigError
from nexactor.tools import files, load_tool


@pytest.fixture
def user_folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "my_own_tools.py").write_text(
        "from nexactor.tools import tool\n"
        "def plain(a: int) -> int:\n    '''Plain.'''\n    return a\n"
        "class Box:\n    @staticmethod\n    def inner(a: int) -> int:\n        return a\n"
        "class Thing: pass\n"
        "number = 3\n"
    )
    (tmp_path / "my_broken_tools.py").write_text("import package_nobody_has\n")
    (tmp_path / "my_failing_tools.py").write_text("raise RuntimeError('at import')\n")
    yield tmp_path
    for name in ("my_own_tools", "my_broken_tools", "my_failing_tools"):
        sys.modules.pop(name, None)


def test_a_decorated_tool_is_found_by_its_own_binding() -> None:
    assert load_tool(files.read_file.binding) is files.read_file
    assert load_tool("nexactor.tools.files:read_file") is files.read_file


def test_a_plain_typed_function_gets_the_defaults(user_folder: Path) -> None:
    plain = load_tool("my_own_tools:plain", beside=user_folder)
    assert (plain.name, plain.repeat, plain.spec.description) == ("plain", "never", "Plain.")
    assert load_tool("my_own_tools:Box.inner", beside=user_folder).name == "inner"
    assert str(user_folder) not in sys.path


@pytest.mark.parametrize(
    ("binding", "parts"),
    [
        ("nexactor.tools.files", ["must look like module:name"]),
        (":x", ["must look like module:name"]),
        (
            "nexactor.tools.fils:read_file",
            ["no module named 'nexactor.tools.fils'", "nexactor.tools.files", "looked in:"],
        ),
        (
            "nexacter.tools.files:read_file",
            ["no module named 'nexacter'", "did you mean nexactor", "looked in:"],
        ),
        ("nexactor.tools.files.deep:x", ["no module named 'nexactor.tools.files.deep'", "not a package"]),
        ("nexactor.tools.files:read_fil", ["has no 'read_fil'", "did you mean read_file", "files.py"]),
        ("my_broken_tools:x", ["my_broken_tools was found, but it imports 'package_nobody_has'"]),
        ("my_failing_tools:x", ["importing my_failing_tools failed: RuntimeError: at import"]),
        ("my_own_tools:number", ["is a int, not a tool"]),
        ("my_own_tools:Thing", ["is a type, not a tool"]),
    ],
)
def test_a_binding_that_fails_says_what_where_and_the_nearest_name(
    user_folder: Path, binding: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tool(binding, beside=user_folder)
    for part in parts:
        assert part in str(caught.value)
