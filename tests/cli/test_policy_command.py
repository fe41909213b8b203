"""`policy get | serve | export`, with the tiny random policy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from nexactor.events.types import PolicyPublished


def test_get_prints_where_the_policy_is(policy: Any, cache: Path) -> None:
    assert policy("policy", "get", "tiny").stdout == f"{cache}/policies/tiny\n"
    assert policy.lines("policy", "get", "tiny", "--json") == [
        {"name": "tiny", "path": f"{cache}/policies/tiny"}
    ]


def test_export_writes_a_hugging_face_folder_with_its_digest(policy: Any, tmp_path: Path) -> None:
    from nexactor.learner.weights import folder_digest

    (line,) = policy.lines("policy", "export", "tiny", str(tmp_path / "out"), "--json")
    assert line == {"path": str(tmp_path / "out"), "digest": folder_digest(tmp_path / "out")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_export_finds_the_policy_that_was_published_last(policy: Any, cache: Path, tmp_path: Path) -> None:
    from nexactor.learner.weights import folder_digest

    path = cache / "policies" / "tiny"
    event = PolicyPublished(version="sft-3", path=str(path), digest=folder_digest(path), step=3)
    policy.write([("learner/sft", [event])])
    for version in ("last", "sft-3"):
        assert policy("policy", "export", version, str(tmp_path / version)).exit_code == 0
        assert (tmp_path / version / "model.safetensors").is_file()


def test_export_refuses_a_published_policy_that_was_altered_since(
    policy: Any, cache: Path, tmp_path: Path
) -> None:
    event = PolicyPublished(version="sft-4", path=str(cache / "policies" / "tiny"), digest="00", step=4)
    policy.write([("learner/sft", [event])])
    result = policy("policy", "export", "sft-4", str(tmp_path / "out"))
    assert (result.exit_code, "as it was published" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("get", "smollm-135"), "did you mean 'smollm2-135m'?"),
        (("export", "last", "new"), "no policy was published"),
        (("export", "tiny", "."), "is not an empty folder"),
        (("serve", "missing-model"), "no policy 'missing-model'"),
        (("serve", "smollm2-135m", "--no-follow"), "nexactor policy get smollm2-135m"),
    ],
)
def test_a_mistake_is_one_clear_error(policy: Any, arguments: tuple[str, ...], says: str) -> None:
    result = policy("policy", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_taken_port_is_named(policy: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = policy("policy", "serve", "tiny", "--port", str(port), "--no-follow")
    assert result.exit_code == 2
    assert str(port) in result.stderr


@pytest.mark.slow
def test_serve_answers_the_openai_api_and_ends_at_sigterm(policy: Any) -> None:
    command = [sys.executable, "-m", "nexactor", "--data", str(policy.data), "policy", "serve", "tiny"]
    server = subprocess.Popen(
        [*command, "--port", "0", "--json", "--slots", "1", "--max-len", "128"],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert server.stdout is not None
    try:
        ready = json.loads(server.stdout.readline())
        assert (ready["ready"], ready["policy_version"]) == (True, "tiny")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        request = urllib.request.Request(
            f"{ready['url']}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] <= 2
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0
