"""The kinds of task of the workspace environment: what is asked, over which files, what must come of it, and how.

A family holds prompt templates, a maker of scenes (start files and expected files, from a random generator), and a
script that solves it through tools. Scripts see only the prompt and the tools' answers: they are what the scripted
expert plays. Words are single tokens of common tokenizers, and prompts, files and answers are short: a policy of
135M parameters trains on them on two CPU cores.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator

import msgspec


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "amber delta iris north river stone forest ocean bridge tower castle market station planet orbit signal engine "
    "budget recipe letter notes schedule survey story travel music health energy paper glass metal winter plan list "
    "draft photo score map guide menu order stock trade bank loan tax vote blog chat team class course exam lesson"
)
FOLDERS = _words("archive backup docs data logs old private public shared work")
EXTENSIONS = _words("txt md csv log")
FIRST = _words(
    "red blue green black white yellow brown gold round square small large quick slow warm cold soft hard"
)
SECOND = _words(
    "fox bear wolf horse bird fish tree leaf flower grass rain snow wind storm cloud sun moon star lake hill road door "
    "wall chair clock cup plate bread milk sugar salt rice soup shirt coat hat ring key coin box bag nail brush wheel "
    "boat plane"
)

Files = dict[str, str]
"""Path to text, every line ended by a newline."""


class Scene(msgspec.Struct, frozen=True):
    """One instance of a family: the values for its templates, the start files and the files that must come of it."""

    values: dict[str, str]
    files: Files
    expected: Files


class Call(msgspec.Struct, frozen=True):
    """A tool call of a script; `arguments` in the order of the tool's signature."""

    tool: str
    arguments: dict[str, str]


class Stuck(Exception):
    """A tool's answer is not what the script can go on from."""


Script = Generator[Call, str, None]


class Family(msgspec.Struct, frozen=True):
    """A kind of task. `novel`: it is never in the training split."""

    name: str
    templates: tuple[str, ...]
    make: Callable[[random.Random], Scene]
    solve: Callable[[dict[str, str], frozenset[str]], Script]
    novel: bool = False

    def parse(self, prompt: str) -> dict[str, str] | None:
        """The values that one of the templates was filled with to give `prompt`; None if it is no task of this kind."""
        for template in self.templates:
            match = _pattern(template).fullmatch(prompt.strip())
            if match:
                return match.groupdict()
        return None


_FIELDS = {"text": r"[^']+", "needle": r"[^']+", "folder": r"[\w-]+/"}
_PATH = r"[\w./-]*\w"


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    out = []
    seen: set[str] = set()
    for i, part in enumerate(parts):
        if i % 2 == 0:
            out.append(re.escape(part))
        elif part in seen:
            out.append(f"(?P={part})")
        else:
            seen.add(part)
            out.append(f"(?P<{part}>{_FIELDS.get(part, _PATH)})")
    return re.compile("".join(out))


# ---- scenes -----------------------------------------------------------------------------------------------


class _Maker:
    """Draws names and lines without repeating a word within one scene, so that a search finds one line."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self._names = random_.sample(NAMES, 8)
        self._second = random_.sample(SECOND, 16)
        self._folders = random_.sample(FOLDERS, 4)
        self.files: Files = {}

    def path(self) -> str:
        name = f"{self._names.pop()}.{self.random.choice(EXTENSIONS)}"
        return f"{self._folders[0]}/{name}" if self.random.random() < 0.3 else name

    def folder(self) -> str:
        return f"{self._folders[1]}/"

    def line(self) -> str:
        return f"{self.random.choice(FIRST)} {self._second.pop()}"

    def file(self, least: int = 1, most: int = 3) -> str:
        path = self.path()
        self.files[path] = "".join(f"{self.line()}\n" for _ in range(self.random.randint(least, most)))
        return path

    def needle(self, path: str) -> str:
        return self.random.choice(self.files[path].splitlines()).split()[1]

    def scene(self, changes: dict[str, str | None], **values: str) -> Scene:
        """`changes`: path to new text, None for a file that must be gone."""
        while len(self.files) < 3:
            self.file()
        expected = dict(self.files)
        for path, text in changes.items():
            if text is None:
                del expected[path]
            else:
                expected[path] = text
        order = sorted(self.files)
        return Scene(values, {path: self.files[path] for path in order}, expected)


def _moved(path: str, folder: str) -> str:
    return folder + path.rpartition("/")[2]


def _make_write(r: random.Random) -> Scene:
    m = _Maker(r)
    path, text = m.path(), m.line()
    return m.scene({path: f"{text}\n"}, path=path, text=text)


def _make_move(r: random.Random) -> Scene:
    m = _Maker(r)
    source, folder = m.file(), m.folder()
    return m.scene({source: None, _moved(source, folder): m.files[source]}, source=source, folder=folder)


def _make_delete(r: random.Random) -> Scene:
    m = _Maker(r)
    path = m.file()
    return m.scene({path: None}, path=path)


def _make_first_line(r: random.Random) -> Scene:
    m = _Maker(r)
    source, target = m.file(2, 3), m.file(1, 2)
    line = m.files[source].splitlines()[0]
    return m.scene({target: f"{m.files[target]}{line}\n"}, source=source, target=target)


def _make_count(r: random.Random) -> Scene:
    m = _Maker(r)
    source, target = m.file(1, 5), m.file(1, 2)
    count = len(m.files[source].splitlines())
    return m.scene({target: f"{m.files[target]}{count}\n"}, source=source, target=target)


def _make_join(r: random.Random) -> Scene:
    m = _Maker(r)
    first, second, target = m.file(1, 1), m.file(1, 1), m.path()
    return m.scene({target: m.files[first] + m.files[second]}, first=first, second=second, target=target)


def _make_find_append(r: random.Random) -> Scene:
    m = _Maker(r)
    path, text = m.file(), m.line()
    return m.scene({path: f"{m.files[path]}{text}\n"}, needle=m.needle(path), text=text)


def _make_find_move(r: random.Random) -> Scene:
    m = _Maker(r)
    path, folder = m.file(), m.folder()
    return m.scene({path: None, _moved(path, folder): m.files[path]}, needle=m.needle(path), folder=folder)


def _make_find_delete(r: random.Random) -> Scene:
    m = _Maker(r)
    path = m.file()
    return m.scene({path: None}, needle=m.needle(path))


def _make_follow(r: random.Random) -> Scene:
    m = _Maker(r)
    path, named = m.path(), m.file()
    m.files[path] = f"{named}\n"
    return m.scene({named: None}, path=path)


def _make_count_move(r: random.Random) -> Scene:
    m = _Maker(r)
    source, target, folder = m.file(1, 5), m.file(1, 2), m.folder()
    count = len(m.files[source].splitlines())
    return m.scene(
        {target: f"{m.files[target]}{count}\n", source: None, _moved(source, folder): m.files[source]},
        source=source,
        target=target,
        folder=folder,
    )


def _make_find_copy(r: random.Random) -> Scene:
    m = _Maker(r)
    path, target = m.file(1, 2), m.path()
    return m.scene({target: m.files[path]}, needle=m.needle(path), target=target)


# ---- scripts ----------------------------------------------------------------------------------------------


def _found(answer: str) -> str:
    """The path in a search's answer, which must be one line `path:line: text`."""
    match = re.fullmatch(rf"({_PATH}):\d+: .*", answer)
    if match is None:
        raise Stuck(f"the search answered {answer!r}")
    return match.group(1)


def _expect(answer: str, *wanted: str) -> None:
    if answer.strip() not in wanted:
        raise Stuck(f"the tool answered {answer!r}")


def _change(call: Call) -> Script:
    _expect((yield call), "ok")


def _by_worker(message: str, tools: frozenset[str]) -> Script:
    if "worker" not in tools:
        raise Stuck(f"there is no worker for {message!r}")
    _expect((yield Call("worker", {"message": message})), "done")


def _move(source: str, folder: str, tools: frozenset[str]) -> Script:
    if "move_file" in tools:
        yield from _change(Call("move_file", {"source": source, "destination": folder}))
    else:
        yield from _by_worker(MOVE.templates[0].format(source=source, folder=folder), tools)


def _delete(path: str, tools: frozenset[str]) -> Script:
    if "delete_file" in tools:
        yield from _change(Call("delete_file", {"path": path}))
    else:
        yield from _by_worker(DELETE.templates[0].format(path=path), tools)


def _append(path: str, content: str) -> Script:
    yield from _change(Call("append_file", {"path": path, "content": content}))


def _write(path: str, content: str) -> Script:
    yield from _change(Call("write_file", {"path": path, "content": content}))


def _solve_write(v: dict[str, str], tools: frozenset[str]) -> Script:
    yield from _write(v["path"], v["text"])


def _solve_move(v: dict[str, str], tools: frozenset[str]) -> Script:
    yield from _move(v["source"], v["folder"], tools)


def _solve_delete(v: dict[str, str], tools: frozenset[str]) -> Script:
    yield from _delete(v["path"], tools)


def _solve_first_line(v: dict[str, str], tools: frozenset[str]) -> Script:
    text = yield Call("read_file", {"path": v["source"]})
    yield from _append(v["target"], text.split("\n")[0])


def _solve_count(v: dict[str, str], tools: frozenset[str]) -> Script:
    count = yield Call("count_lines", {"path": v["source"]})
    if not count.isdigit():
        raise Stuck(f"count_lines answered {count!r}")
    yield from _append(v["target"], count)


def _solve_join(v: dict[str, str], tools: frozenset[str]) -> Script:
    first = yield Call("read_file", {"path": v["first"]})
    second = yield Call("read_file", {"path": v["second"]})
    yield from _write(v["target"], f"{first}\n{second}")


def _solve_find_append(v: dict[str, str], tools: frozenset[str]) -> Script:
    path = _found((yield Call("search", {"pattern": v["needle"]})))
    yield from _append(path, v["text"])


def _solve_find_move(v: dict[str, str], tools: frozenset[str]) -> Script:
    path = _found((yield Call("search", {"pattern": v["needle"]})))
    yield from _move(path, v["folder"], tools)


def _solve_find_delete(v: dict[str, str], tools: frozenset[str]) -> Script:
    path = _found((yield Call("search", {"pattern": v["needle"]})))
    yield from _delete(path, tools)


def _solve_follow(v: dict[str, str], tools: frozenset[str]) -> Script:
    named = yield Call("read_file", {"path": v["path"]})
    if re.fullmatch(_PATH, named) is None:
        raise Stuck(f"read_file answered {named!r}")
    yield from _delete(named, tools)


def _solve_count_move(v: dict[str, str], tools: frozenset[str]) -> Script:
    yield from _solve_count(v, tools)
    yield from _move(v["source"], v["folder"], tools)


def _solve_find_copy(v: dict[str, str], tools: frozenset[str]) -> Script:
    path = _found((yield Call("search", {"pattern": v["needle"]})))
    text = yield Call("read_file", {"path": path})
    yield from _write(v["target"], text)


# ---- the table --------------------------------------------------------------------------------------------

MOVE = Family(
    "move", ("Move {source} to {folder}.", "{source} belongs in {folder}."), _make_move, _solve_move
)
DELETE = Family("delete", ("Delete {path}.", "Get rid of {path}."), _make_delete, _solve_delete)

FAMILIES: tuple[Family, ...] = (
    Family(
        "write",
        ("Create {path} with the text '{text}'.", "Write '{text}' to the new file {path}."),
        _make_write,
        _solve_write,
    ),
    Family(
        "find_move",
        (
            "Move the file that mentions '{needle}' to {folder}.",
            "The file about '{needle}' belongs in {folder}.",
        ),
        _make_find_move,
        _solve_find_move,
    ),
    Family(
        "first_line",
        (
            "Add the first line of {source} to the end of {target}.",
            "{target} should end with the first line of {source}.",
        ),
        _make_first_line,
        _solve_first_line,
    ),
    MOVE,
    Family(
        "count",
        (
            "Append the number of lines of {source} to {target}.",
            "How many lines has {source}? Add the number to {target}.",
        ),
        _make_count,
        _solve_count,
    ),
    Family(
        "follow",
        ("{path} names a file. Delete that file.", "Delete the file that is named in {path}."),
        _make_follow,
        _solve_follow,
    ),
    Family(
        "join",
        (
            "Join {first} and {second} into {target}.",
            "Write {first} followed by {second} to the new file {target}.",
        ),
        _make_join,
        _solve_join,
    ),
    DELETE,
    Family(
        "find_append",
        (
            "Add '{text}' to the file that mentions '{needle}'.",
            "The file about '{needle}' should end with '{text}'.",
        ),
        _make_find_append,
        _solve_find_append,
    ),
    Family(
        "count_move",
        (
            "Append the number of lines of {source} to {target}, then move {source} to {folder}.",
            "Count the lines of {source}, add the number to {target} and move {source} to {folder}.",
        ),
        _make_count_move,
        _solve_count_move,
    ),
    Family(
        "find_delete",
        ("Delete the file that mentions '{needle}'.", "Get rid of the file about '{needle}'."),
        _make_find_delete,
        _solve_find_delete,
    ),
    Family(
        "find_copy",
        (
            "Copy the file that mentions '{needle}' to {target}.",
            "{target} should be a copy of the file about '{needle}'.",
        ),
        _make_find_copy,
        _solve_find_copy,
        novel=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}


def recognise(prompt: str) -> tuple[Family, dict[str, str]] | None:
    """The family that `prompt` belongs to, with its values."""
    for family in FAMILIES:
        values = family.parse(prompt)
        if values is not None:
            return family, values
    return None
