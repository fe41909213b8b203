"""Paths a model names, made into paths inside its workspace, or refused."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nexactor.tools.protocol import ToolContext, ToolError

_SKIPPED_FOLDERS = frozenset({".git"})


def workspace_of(context: ToolContext) -> Path:
    """The real path of the caller's workspace folder. Raises ToolError if it has none or it is gone."""
    if context.workspace is None:
        raise ToolError("this agent has no workspace folder, so it cannot work with files")
    root = context.workspace.resolve()
    if not root.is_dir():
        raise ToolError("the workspace folder does not exist")
    return root


def confined(root: Path, path: str) -> Path:
    """The real path of `path` within `root` (itself real). Links are followed and must stay inside.

    Raises ToolError for absolute paths, `..`, and links that lead out. What another process changes between this
    check and the use of the path is not covered: run untrusted programs in a sandbox, not beside these tools.
    """
    name = path.strip()
    if "\0" in name or "\\" in name:
        raise ToolError("a path is names joined by /, without backslashes")
    if name.startswith(("/", "~")):
        raise ToolError(f"{name} is outside of the workspace; use a path relative to it")
    if ".." in name.split("/"):
        raise ToolError(f"{name} is outside of the workspace: .. is not allowed")
    try:
        real = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a name too long
        raise ToolError(f"{_short(name)} is not a usable path: {error}") from error
    if not real.is_relative_to(root):
        raise ToolError(f"{name} is a link that leads out of the workspace")
    return real


def existing_file(root: Path, path: str) -> Path:
    """The real path of a regular file in the workspace. Raises ToolError that names the nearest files."""
    real = confined(root, path)
    mode = _mode(real, path)
    if mode is None:
        shown = relative(root, real)
        names = [relative(root, f) for f in files_under(root)]
        near = difflib.get_close_matches(shown, names, n=2, cutoff=0.5) or names[:5]
        raise ToolError(f"no file {_short(shown)}; there is: {', '.join(near) or 'no file at all'}")
    if stat.S_ISDIR(mode):
        raise ToolError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(mode):  # reading a pipe or a device could block for ever
        raise ToolError(f"{path} is not a regular file")
    return real


def writable_file(root: Path, path: str) -> Path:
    """The real path of a regular file to create or replace. Its folders may be missing, but must not be files."""
    real = confined(root, path)
    if real == root or path.rstrip().endswith("/"):
        raise ToolError(f"{path.strip() or 'the path'} names a folder; add a file name")
    for folder in real.relative_to(root).parents:
        mode = _mode(root / folder, path)
        if mode is not None and not stat.S_ISDIR(mode):
            raise ToolError(f"{folder} is a file, so {path} cannot be inside of it")
    if _mode(real, path) is not None:
        return existing_file(root, path)
    return real


def relative(root: Path, path: Path) -> str:
    """`path` as the model writes it."""
    return path.relative_to(root).as_posix()


def files_under(folder: Path) -> Iterator[Path]:
    """Regular files below `folder`, by name; links and `.git` are left out. `folder` may be a file itself."""
    if folder.is_file():
        yield folder
        return
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            file = Path(place, name)
            if stat.S_ISREG(file.lstat().st_mode):
                yield file


def _mode(real: Path, shown: str) -> int | None:
    try:
        return real.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ToolError(f"{_short(shown)} is not a usable path: {error.strerror}") from error


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
