"""File tools confined to the caller's workspace folder.

Made for small models too: few arguments, and answers of a few tokens. Text files are UTF-8; the writing tools end a
text with a newline and `read_file` leaves the last one out, so that a model never has to count them. Reading tools
are `safe`; changing ones are `idempotent` through the workspace's `EffectJournal`.

The first docstring line of each tool is what a model pays for in every prompt: keep them short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nexactor.tools.confinement import (
    confined,
    existing_file,
    files_under,
    relative,
    workspace_of,
    writable_file,
)
from nexactor.tools.decorator import tool
from nexactor.tools.journal import Edit, EffectJournal, Plan
from nexactor.tools.protocol import ToolContext, ToolError

OK = "ok"
_MAX_BYTES = 4 << 20


@tool(repeat="safe")
def list_files(context: ToolContext, path: str = "") -> str:
    """List files."""
    root = workspace_of(context)
    folder = confined(root, path)
    if not folder.exists():
        raise ToolError(f"no folder {path}")
    return "\n".join(relative(root, file) for file in files_under(folder)) or "no files"


@tool(repeat="safe")
def read_file(path: str, context: ToolContext) -> str:
    """Read a file."""
    return _text(existing_file(workspace_of(context), path), path).removesuffix("\n")


@tool(repeat="safe")
def search(pattern: str, context: ToolContext, path: str = "") -> str:
    """Find the lines that contain a text.

    `pattern` is plain text, not a regular expression. Answers lines of the form `path:line: text`.
    """
    if not pattern:
        raise ToolError("the pattern is empty; give the text to look for")
    root = workspace_of(context)
    folder = confined(root, path)
    if not folder.exists():
        raise ToolError(f"no file or folder {path}")
    found = list(_matches(root, folder, pattern))
    return "\n".join(found) or "not found"


@tool(repeat="safe")
def count_lines(path: str, context: ToolContext) -> str:
    """Count the lines of a file."""
    return str(len(_text(existing_file(workspace_of(context), path), path).splitlines()))


@tool(repeat="idempotent")
def write_file(path: str, content: str, context: ToolContext) -> str:
    """Create or replace a file."""

    def plan(root: Path) -> Plan:
        return Plan((Edit(writable_file(root, path), _bytes(content)),), OK)

    return _perform(context, "write_file", plan)


@tool(repeat="idempotent")
def append_file(path: str, content: str, context: ToolContext) -> str:
    """Add lines to the end of a file."""

    def plan(root: Path) -> Plan:
        file = writable_file(root, path)
        before = _text(file, path) if file.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        return Plan((Edit(file, before.encode() + _bytes(content)),), OK)

    return _perform(context, "append_file", plan)


@tool(repeat="idempotent")
def replace_text(path: str, old: str, new: str, context: ToolContext) -> str:
    """Replace a text that occurs once in a file."""

    def plan(root: Path) -> Plan:
        file = existing_file(root, path)
        text = _text(file, path)
        count = text.count(old) if old else 0
        if count != 1:
            reason = "is empty" if not old else "does not occur" if count == 0 else f"occurs {count} times"
            raise ToolError(
                f"nothing changed: the old text {reason} in {path}; copy it exactly, with enough around it"
            )
        return Plan((Edit(file, text.replace(old, new).encode("utf-8", "replace")),), OK)

    return _perform(context, "replace_text", plan)


@tool(repeat="idempotent")
def move_file(source: str, destination: str, context: ToolContext) -> str:
    """Move or rename a file.

    A destination that ends in `/` or is a folder keeps the file's name. An existing file is never overwritten.
    """

    def plan(root: Path) -> Plan:
        file = existing_file(root, source)
        into_folder = destination.strip().endswith("/") or confined(root, destination).is_dir()
        target = writable_file(root, f"{destination.strip()}/{file.name}" if into_folder else destination)
        if target == file:
            raise ToolError(f"{source} is already there")
        if target.exists():
            raise ToolError(
                f"{relative(root, target)} already exists; delete it first or choose another name"
            )
        return Plan((Edit(target, _raw(file, source)), Edit(file, None)), OK)

    return _perform(context, "move_file", plan)


@tool(repeat="idempotent")
def delete_file(path: str, context: ToolContext) -> str:
    """Delete a file."""

    def plan(root: Path) -> Plan:
        return Plan((Edit(existing_file(root, path), None),), OK)

    return _perform(context, "delete_file", plan)


def _perform(context: ToolContext, name: str, plan: Callable[[Path], Plan]) -> str:
    root = workspace_of(context)
    return EffectJournal(root).perform(context.effect_id, name, lambda: plan(root))


def _matches(root: Path, folder: Path, pattern: str) -> Iterator[str]:
    for file in files_under(folder):
        if file.stat().st_size > _MAX_BYTES:
            continue
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern in line:
                yield f"{relative(root, file)}:{number}: {line.strip()[:200]}"


def _raw(file: Path, shown: str) -> bytes:
    size = file.stat().st_size
    if size > _MAX_BYTES:
        raise ToolError(f"{shown} is too large ({size} bytes; the limit is {_MAX_BYTES})")
    return file.read_bytes()


def _text(file: Path, shown: str) -> str:
    try:
        return _raw(file, shown).decode()
    except UnicodeDecodeError as error:
        raise ToolError(f"{shown} is not UTF-8 text") from error


def _bytes(content: str) -> bytes:
    text = content if not content or content.endswith("\n") else f"{content}\n"
    return text.encode("utf-8", "replace")
