"""What a newcomer copies works as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexactor.spec_yaml import load_spec

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_hello_runs_offline_and_prints_its_events(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "NEXACTOR_"))}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "hello.py")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "17 + 25 = 42"
    assert len(lines) == 13
    assert lines[-1].endswith("RunFinished")


@pytest.mark.parametrize("agent", ["coder", "workspace"])
def test_the_example_agents_load(agent: str) -> None:
    env = {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1", "OPENAI_API_KEY": "none"}
    tree = load_spec(EXAMPLES / agent / "agent.yaml", env=env)
    assert tree.root.tools
    assert (len(tree.all) > 1) == (agent == "workspace")
