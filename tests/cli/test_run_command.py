"""`run`, `node` and `replay` as a person uses them: processes of their own, a scripted model behind a real endpoint."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from nexactor.testing import ScriptedModel, call

AGENT = """\
name: scribe
system_prompt: Write.
llm_config: {model: m, base_url: "${env.OPENAI_BASE_URL}", api_key: "${env.OPENAI_API_KEY}"}
tools: [{binding: "nexactor.tools.files:write_file"}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("NEXACTOR_NATS_URL", "NEXACTOR_DATA", "NEXACTOR_NAMESPACE", "NEXACTOR_JOURNAL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "agent.yaml").write_text(AGENT)
    return tmp_path


async def nexactor(folder: Path, *arguments: str, url: str = "http://127.0.0.1:1/v1") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line in `folder`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "nexactor",
        *arguments,
        cwd=folder,
        env={**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none", "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_run_writes_its_file_and_replays_and_an_altered_prompt_file_changes_nothing_of_it(
    folder: Path,
) -> None:
    async with ScriptedModel([call("write_file", path="a.txt", content="hi"), "written"]) as model:
        code, out, err = await nexactor(folder, "run", "agent.yaml", "write hi", "--json", url=model.url)
    assert code == 0, err
    result = json.loads(out)
    assert (result["status"], result["result"]) == ("finished", "written")
    assert (folder / "a.txt").read_text() == "hi\n"
    assert "write_file" in err
    (folder / "agent.yaml").write_text("name: another\nllm_config: {model: m}\n")
    code, out, err = await nexactor(folder, "replay", result["run"], "--verify", "--json")
    assert code == 0, err
    assert json.loads(out) == {"verified": 1, "failed": 0, "events": 12, "prompts": 2, "divergences": []}


async def test_a_run_interrupted_by_ctrl_c_is_resumed_where_it_stopped(folder: Path) -> None:
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def script(messages: list[dict[str, Any]]) -> Any:
        if messages[-1]["role"] == "tool":
            asked.set()
            await gate.wait()
            return "done"
        return call("write_file", path="a.txt", content="hi")

    async with ScriptedModel(script) as model:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nexactor", "run", "agent.yaml", "write hi"),
            cwd=folder,
            env={**os.environ, "OPENAI_BASE_URL": model.url, "OPENAI_API_KEY": "none"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        await asked.wait()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        assert process.returncode == 130
        assert b"Traceback" not in err
        gate.set()
        code, out, text = await nexactor(folder, "run", "--resume", "last", "--json", url=model.url)
    assert code == 0, text
    assert json.loads(out)["result"] == "done"
    assert all(n == 1 for n in model.generated.values())


async def test_a_refused_model_call_is_exit_code_1_and_says_why(folder: Path) -> None:
    async with ScriptedModel([]) as model:
        code, out, _ = await nexactor(folder, "run", "agent.yaml", "go", url=model.url)
    assert code == 1
    assert "no more answers" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("system_prompt", "sistem_prompt"),
            ["agent.yaml:2", "sistem_prompt", "did you mean 'system_prompt'"],
        ),
        (("${env.OPENAI_API_KEY}", "${env.NO_SUCH_KEY}"), ["agent.yaml:3", "NO_SUCH_KEY is not set"]),
        (("files:write_file", "files:wirte_file"), ["agent.yaml:4", "tools[0].binding", "write_file"]),
        (("nexactor.tools.files", "no.such.module"), ["agent.yaml:4", "no.such.module"]),
        (
            ("system_prompt: Write.", "sub_agents: [{name: me, config_path: agent.yaml}]"),
            ["sub-agents of each other", "agent.yaml -> agent.yaml"],
        ),
    ],
)
async def test_a_mistake_in_the_agents_file_is_exit_code_2_and_starts_nothing(
    folder: Path, change: tuple[str, str], said: list[str]
) -> None:
    (folder / "agent.yaml").write_text(AGENT.replace(*change))
    code, _, err = await nexactor(folder, "run", "agent.yaml", "go")
    assert code == 2
    assert "Traceback" not in err
    for part in said:
        assert part in err
    assert not (folder / ".nexactor").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "none.yaml", "go"), "none.yaml: the agent's file cannot be read: there is no such file"),
        (("run", "agent.yaml"), "say which agent and what to do"),
        (("run", "agent.yaml", "go", "--workspace", "nowhere"), "there is no such folder"),
        (("run", "agent.yaml", "go", "--nats-url", "nats://127.0.0.1:1"), "no NATS server answers"),
        (("node", "--nats-url", "nats://127.0.0.1:1"), "no NATS server answers"),
        (("replay", "--all"), "there is no event log"),
        (("replay",), "say which run to replay"),
        (("demo", "--policy", "no-such-policy"), "no-such-policy"),
        (("demo", "--out", "."), "holds something else than a demo"),
    ],
)
async def test_a_wrong_command_is_exit_code_2_and_one_screen(
    folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = await nexactor(folder, *arguments)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 21


async def test_sigterm_ends_a_command_cleanly_and_the_demo_takes_its_processes_with_it(folder: Path) -> None:
    from nexactor.learner.tiny import make_tiny_policy

    make_tiny_policy(folder / "tiny")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nexactor", "demo", "--minutes", "1", "--policy", "tiny", "--out", "out"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    while b"two nodes" not in await process.stdout.readline():
        assert process.returncode is None
    process.terminate()
    rest = await process.stdout.read()
    assert await process.wait() == 143
    assert b"Traceback" not in rest
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder / "out").encode() in _read(p)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # It ended in the meantime.
