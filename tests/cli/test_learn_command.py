"""`learn run CONFIG`, on a tiny policy and a log of two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.usefixtures("orbax_leftovers"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TRAIN = """
policy: {policy}
out: {out}
batch: 1
wait_for_reward: false
data: {{max_tokens: 128}}
buckets: [128]
"""


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> Path:
    """A learner's file that takes one run a step and waits for more."""
    path = tmp_path / "learner.yaml"
    path.write_text(TRAIN.format(policy=cache / "policies" / "tiny", out=tmp_path / "out"))
    return path


def test_learn_run_trains_on_what_the_log_holds_and_publishes(policy: Any, config: Path) -> None:
    config.write_text(config.read_text() + "follow: false\n")
    *steps, end = policy.lines("learn", "run", str(config), "--json")
    assert [(s["step"], s["runs"]) for s in steps] == [(1, 1), (2, 1)]
    assert (end["step"], end["reason"], end["version"]) == (2, "end_of_log", "main-000002")
    assert Path(end["path"], "model.safetensors").is_file()
    # A second start has nothing left to do and says where the policy is.
    again = policy("learn", "run", str(config))
    assert again.exit_code == 0
    assert "step 2: the log has no more runs; policy main-000002" in again.stdout

    for file in Path(end["path"]).parents[1].glob("checkpoints/*/**/*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    result = policy("learn", "run", str(config))
    assert result.exit_code == 2, result.output
    assert "checkpoint" in result.stderr
    assert "Traceback" not in result.output


def test_sigterm_lets_the_step_in_hand_finish_and_be_saved(policy: Any, config: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "nexactor",
        "--data",
        str(policy.data),
        "learn",
        "run",
        str(config),
        "--json",
    ]
    learner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert learner.stdout is not None
    try:
        assert json.loads(learner.stdout.readline())["step"] == 1
    finally:
        learner.send_signal(signal.SIGTERM)
        rest, _ = learner.communicate(timeout=120)
    end = json.loads(rest.splitlines()[-1])
    assert (learner.returncode, end["reason"], end["version"]) == (0, "stopped", f"main-{end['step']:06d}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "policy: tiny\nout: x\nbach: 2\n",
            "learner.yaml:3: bach: there is no such key; did you mean 'batch'?",
        ),
        ("policy: tiny\nout: x\nbatch: many\n", "learner.yaml:3: batch"),
        ("policy: [\n", "learner.yaml"),
        ("out: x\n", "policy"),
        ("policy: no-such-model\nout: x\n", "no policy 'no-such-model'"),
    ],
)
def test_a_mistake_in_the_file_is_one_clear_error(policy: Any, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "learner.yaml"
    path.write_text(text)
    result = policy("learn", "run", str(path))
    assert result.exit_code == 2
    assert says in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


def test_a_missing_file_is_named(policy: Any) -> None:
    result = policy("learn", "run", "none.yaml")
    assert (result.exit_code, "none.yaml" in result.stderr) == (2, True)
