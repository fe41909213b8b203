"""File tools: what they do, and that they stay in the workspace."""

from __future__ import annotations

import asyncio
import json
import os
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexactor.tools import Tool, ToolContext, ToolError, files
from nexactor.tools.confinement import confined
from nexactor.tools.journal import count_applied, journal_path

_effects = count()
ALL = (
    files.list_files,
    files.read_file,
    files.search,
    files.count_lines,
    files.write_file,
    files.append_file,
    files.replace_text,
    files.move_file,
    files.delete_file,
)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "ws"
    (folder / "docs").mkdir(parents=True)
    (folder / "a.txt").write_text("red fox\nblue wolf\n")
    (folder / "docs" / "b.md").write_text("green tree")
    (tmp_path / "secret.txt").write_text("secret\n")
    return folder


async def use(chosen: Tool, workspace: Path, effect: str = "", **arguments: str) -> str:
    context = ToolContext(effect_id=effect or f"effect {next(_effects)}", workspace=workspace)
    return (await chosen.run(json.dumps(arguments), context)).text


def test_reading_is_safe_and_changing_is_idempotent() -> None:
    assert {t.name: t.repeat for t in ALL} == {
        **dict.fromkeys(("list_files", "read_file", "search", "count_lines"), "safe"),
        **dict.fromkeys(
            ("write_file", "append_file", "replace_text", "move_file", "delete_file"), "idempotent"
        ),
    }


async def test_reading_tools_answer_in_few_words(workspace: Path) -> None:
    assert await use(files.list_files, workspace) == "a.txt\ndocs/b.md"
    assert await use(files.list_files, workspace, path="docs") == "docs/b.md"
    assert await use(files.read_file, workspace, path="a.txt") == "red fox\nblue wolf"
    assert await use(files.read_file, workspace, path="./docs//b.md") == "green tree"
    assert await use(files.search, workspace, pattern="wolf") == "a.txt:2: blue wolf"
    assert await use(files.search, workspace, pattern="e", path="docs/b.md") == "docs/b.md:1: green tree"
    assert await use(files.search, workspace, pattern="nobody") == "not found"
    assert await use(files.count_lines, workspace, path="a.txt") == "2"
    assert await use(files.count_lines, workspace, path="docs/b.md") == "1"


async def test_writing_tools_end_a_text_with_one_newline(workspace: Path) -> None:
    assert await use(files.write_file, workspace, path="new/c.txt", content="one") == "ok"
    assert (workspace / "new/c.txt").read_text() == "one\n"
    await use(files.append_file, workspace, path="new/c.txt", content="two\n")
    assert (workspace / "new/c.txt").read_text() == "one\ntwo\n"
    await use(files.append_file, workspace, path="docs/b.md", content="more")
    assert (workspace / "docs/b.md").read_text() == "green tree\nmore\n"
    await use(files.write_file, workspace, path="a.txt", content="")
    assert (workspace / "a.txt").read_text() == ""
    await use(files.append_file, workspace, path="fresh.txt", content="first")
    assert (workspace / "fresh.txt").read_text() == "first\n"


async def test_moving_keeps_the_content_and_makes_folders(workspace: Path) -> None:
    await use(files.move_file, workspace, source="a.txt", destination="old/")
    assert (workspace / "old/a.txt").read_text() == "red fox\nblue wolf\n"
    assert not (workspace / "a.txt").exists()
    await use(files.move_file, workspace, source="old/a.txt", destination="docs")
    assert (workspace / "docs/a.txt").exists()
    await use(files.move_file, workspace, source="docs/a.txt", destination="renamed.txt")
    assert (workspace / "renamed.txt").exists()


async def test_moving_never_overwrites(workspace: Path) -> None:
    with pytest.raises(ToolError, match=r"docs/b\.md already exists"):
        await use(files.move_file, workspace, source="a.txt", destination="docs/b.md")
    with pytest.raises(ToolError, match="already there"):
        await use(files.move_file, workspace, source="a.txt", destination="a.txt")


async def test_a_replaced_text_must_occur_once(workspace: Path) -> None:
    await use(files.replace_text, workspace, path="a.txt", old="red", new="old")
    assert (workspace / "a.txt").read_text() == "old fox\nblue wolf\n"
    for old, reason in (("o", "occurs 3 times"), ("none", "does not occur"), ("", "is empty")):
        with pytest.raises(ToolError, match=reason):
            await use(files.replace_text, workspace, path="a.txt", old=old, new="x")


async def test_an_executable_stays_executable(workspace: Path) -> None:
    (workspace / "a.txt").chmod(0o755)
    await use(files.append_file, workspace, path="a.txt", content="x")
    assert (workspace / "a.txt").stat().st_mode & 0o777 == 0o755


async def test_a_change_made_twice_under_one_effect_id_happens_once(workspace: Path) -> None:
    for _ in range(2):
        assert await use(files.append_file, workspace, "e1", path="a.txt", content="x") == "ok"
        assert await use(files.move_file, workspace, "e2", source="docs/b.md", destination="c.md") == "ok"
        assert await use(files.delete_file, workspace, "e3", path="c.md") == "ok"
    assert (workspace / "a.txt").read_text() == "red fox\nblue wolf\nx\n"
    assert count_applied(journal_path(workspace)) == {"e1": 1, "e2": 1, "e3": 1}


async def test_parallel_changes_are_all_kept(workspace: Path) -> None:
    await asyncio.gather(
        *(use(files.append_file, workspace, path="a.txt", content=str(i)) for i in range(20))
    )
    lines = (workspace / "a.txt").read_text().splitlines()
    assert sorted(lines[2:], key=int) == [str(i) for i in range(20)]


async def test_a_missing_file_is_answered_with_the_nearest_names(workspace: Path) -> None:
    with pytest.raises(ToolError, match=r"no file docs/b\.txt; there is: docs/b\.md"):
        await use(files.read_file, workspace, path="docs/b.txt")


async def test_wrong_kinds_of_path_are_named(workspace: Path) -> None:
    os.mkfifo(workspace / "pipe")
    (workspace / "binary").write_bytes(b"\xff\xfe")
    for chosen, arguments, message in (
        (files.read_file, {"path": "docs"}, "docs is a folder"),
        (files.read_file, {"path": "pipe"}, "not a regular file"),
        (files.read_file, {"path": "binary"}, "not UTF-8"),
        (files.write_file, {"path": "docs/", "content": "x"}, "names a folder"),
        (files.write_file, {"path": "", "content": "x"}, "names a folder"),
        (files.write_file, {"path": "docs", "content": "x"}, "docs is a folder"),
        (files.write_file, {"path": "pipe", "content": "x"}, "not a regular file"),
        (files.write_file, {"path": "a.txt/b.txt", "content": "x"}, "a.txt is a file, so"),
        (files.write_file, {"path": "n" * 300, "content": "x"}, "not a usable path"),
        (files.search, {"pattern": ""}, "the pattern is empty"),
        (files.search, {"pattern": "x", "path": "none"}, "no file or folder none"),
        (files.list_files, {"path": "none"}, "no folder none"),
    ):
        with pytest.raises(ToolError, match=message):
            await use(chosen, workspace, **arguments)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "docs/../../secret.txt",
        "/etc/passwd",
        "~/x",
        "out",
        "dir/secret.txt",
        "a\0b",
        "..\\secret.txt",
        "loop",
    ],
)
@pytest.mark.parametrize("chosen", ALL, ids=lambda t: t.name)
async def test_no_tool_leaves_the_workspace(workspace: Path, chosen: Tool, path: str) -> None:
    (workspace / "out").symlink_to(workspace.parent / "secret.txt")
    (workspace / "dir").symlink_to(workspace.parent, target_is_directory=True)
    (workspace / "loop").symlink_to("loop")
    required = chosen.spec.parameters.get("required", [])
    pathlike = [n for n in chosen.spec.parameters["properties"] if n in ("path", "source", "destination")]
    for attacked in pathlike:
        arguments = {n: "a.txt" if n in ("source", "path") else "x" for n in required} | {attacked: path}
        with pytest.raises(ToolError):
            await use(chosen, workspace, **arguments)
    assert (workspace.parent / "secret.txt").read_text() == "secret\n"
    assert sorted(p.name for p in workspace.parent.iterdir()) in (
        ["secret.txt", "ws"],
        ["secret.txt", "ws", "ws.journal.jsonl"],
    )


async def test_a_search_does_not_follow_links_out(workspace: Path) -> None:
    (workspace / "out").symlink_to(workspace.parent / "secret.txt")
    (workspace / "dir").symlink_to(workspace.parent, target_is_directory=True)
    assert await use(files.search, workspace, pattern="secret") == "not found"
    assert await use(files.list_files, workspace) == "a.txt\ndocs/b.md"


async def test_links_within_the_workspace_work(workspace: Path) -> None:
    (workspace / "link").symlink_to("docs/b.md")
    assert await use(files.read_file, workspace, path="link") == "green tree"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "docs", "dir", "~", "\0", "\\", " ", "é"]), max_size=6),
    st.booleans(),
)
@example(["..", "docs"], False)
def test_no_path_whatever_resolves_outside(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], rooted: bool
) -> None:
    root = tmp_path_factory.getbasetemp() / "confined"
    (root / "docs").mkdir(parents=True, exist_ok=True)
    if not (root / "dir").is_symlink():
        (root / "dir").symlink_to("..")
    try:
        found = confined(root.resolve(), ("/" if rooted else "") + "/".join(parts))
    except ToolError:
        return
    assert found.is_relative_to(root.resolve())


async def test_without_a_workspace_there_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no workspace"):
        await files.read_file.run('{"path": "a"}', ToolContext())
    with pytest.raises(ToolError, match="does not exist"):
        await files.read_file.run('{"path": "a"}', ToolContext(workspace=tmp_path / "gone"))
