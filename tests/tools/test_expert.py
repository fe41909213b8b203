"""The expert solves every task through real tools, as a lead with a worker, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml

from nexactor.events.errors import ConfigError
from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.events.toolformat import parse_answer, render_answer
from nexactor.tools import Tool, ToolContext, files, load_tool
from nexactor.tools.expert import ExpertError, expert_answer
from nexactor.tools.expert_server import serve_expert
from nexactor.tools.journal import count_applied, journal_path
from nexactor.tools.workspace import Workspace
from nexactor.tools.workspace_families import FAMILIES, Family

WORKER = ToolSpec("worker", "Moves or deletes a file.", {"properties": {"message": {"type": "string"}}})
LEAD_TOOLS = (files.read_file, files.search, files.count_lines, files.write_file, files.append_file)
WORKER_TOOLS = (files.move_file, files.delete_file)
LEAD_SPECS = (*(t.spec for t in LEAD_TOOLS), WORKER)
WORKER_SPECS = tuple(t.spec for t in WORKER_TOOLS)
EXAMPLES = Path(__file__).parents[2] / "examples"


async def play(
    prompt: str, specs: tuple[ToolSpec, ...], workspace: Path, effect: str, calls: list[ToolCall]
) -> str:
    """An agent in ten lines: the expert answers, real tools run, the worker is the same again."""
    tools: dict[str, Tool] = {tool.name: tool for tool in (*LEAD_TOOLS, *WORKER_TOOLS)}
    messages = [Message("system", "Work."), Message("user", prompt)]
    while (answer := expert_answer(messages, specs)).tool_calls:
        messages.append(answer)
        for call in answer.tool_calls:
            calls.append(call)
            assert call.name in {spec.name for spec in specs}
            effect = f"{effect}.{len(messages)}"
            if call.name == "worker":
                message = json.loads(call.arguments)["message"]
                text = await play(message, WORKER_SPECS, workspace, effect, calls)
            else:
                text = (
                    await tools[call.name].run(call.arguments, ToolContext(effect, workspace=workspace))
                ).text
            messages.append(Message("tool", text, tool_call_id=call.id))
    return answer.content


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
async def test_the_expert_solves_every_task_of_a_family(family: Family, tmp_path: Path) -> None:
    environment = Workspace()
    lengths = set()
    cases = [("novel", 20_000_000)] if family.novel else [("train", 0), ("heldout", 10_000_000)]
    for split, first in cases:
        for seed in range(first, first + 300 // len(cases)):
            task = environment.task(split, family.name, seed)
            workspace = environment.reset(task, tmp_path)
            calls: list[ToolCall] = []
            assert await play(task.prompt, LEAD_SPECS, workspace, task.id, calls) == "done"
            assert environment.score(task, workspace, "done").success, task
            lengths.add(len([c for c in calls if c.name != "worker"]))
            assert all(n == 1 for n in count_applied(journal_path(workspace)).values())
    assert len(lengths) == 1
    assert 1 <= lengths.pop() <= 4


def test_the_expert_is_a_function_of_the_conversation() -> None:
    messages = [Message("user", "Move the file that mentions 'fox' to old/.")]
    first = expert_answer(messages, LEAD_SPECS)
    assert first == expert_answer(messages, LEAD_SPECS)
    assert (
        render_answer(first) == '<tool_call>{"name": "search", "arguments": {"pattern": "fox"}}</tool_call>'
    )
    messages += [first, Message("tool", "a.txt:1: red fox")]
    second = expert_answer(messages, LEAD_SPECS)
    assert second.tool_calls[0].arguments == '{"message": "Move a.txt to old/."}'


def test_the_expert_writes_calls_exactly_as_a_parsed_answer_gives_them_back() -> None:
    messages = [Message("user", "Join a.txt and b.txt into c.txt.")]
    for text in ("ré d", 'b"l\\ue'):
        messages += [expert_answer(messages, LEAD_SPECS), Message("tool", text)]
    call = expert_answer(messages, LEAD_SPECS).tool_calls[0]
    assert parse_answer(render_answer(Message("assistant", tool_calls=(call,)))).calls == (
        (call.name, call.arguments),
    )


def test_the_expert_does_itself_what_it_has_tools_for() -> None:
    everything = (*LEAD_SPECS, *WORKER_SPECS)
    answer = expert_answer([Message("user", "Delete a.txt.")], everything)
    assert answer.tool_calls[0].name == "delete_file"


def test_only_the_last_task_of_a_longer_conversation_counts() -> None:
    messages = [
        Message("user", "Delete a.txt."),
        Message("assistant", tool_calls=(ToolCall("1", "delete_file", "{}"),)),
        Message("tool", "ok"),
        Message("assistant", "done"),
        Message("user", "Delete b.txt."),
    ]
    assert expert_answer(messages, WORKER_SPECS).tool_calls[0].arguments == '{"path": "b.txt"}'


@pytest.mark.parametrize(
    "answer", ["not found", "a.txt:1: fox\nb.txt:1: fox", "no file a.txt", "failed: x", ""]
)
def test_a_tool_that_failed_ends_the_work_honestly(answer: str) -> None:
    messages = [Message("user", "Delete the file that mentions 'fox'.")]
    messages += [expert_answer(messages, LEAD_SPECS), Message("tool", answer)]
    final = expert_answer(messages, LEAD_SPECS)
    assert final.content.startswith("failed: ")
    assert not final.tool_calls


@pytest.mark.parametrize(
    ("messages", "specs", "message"),
    [
        ([Message("user", "What is the capital of France?")], LEAD_SPECS, "this is none: 'What is"),
        ([Message("system", "Work.")], LEAD_SPECS, "no user message"),
        ([Message("user", "Count the lines of a, add the number to b and move a to c/.")], (), "count_lines"),
    ],
)
def test_an_unknown_conversation_is_refused(
    messages: list[Message], specs: tuple[ToolSpec, ...], message: str
) -> None:
    with pytest.raises(ExpertError, match=message):
        expert_answer(messages, specs)


@pytest.mark.parametrize(("file", "tools"), [("agent.yaml", LEAD_TOOLS), ("worker.yaml", WORKER_TOOLS)])
def test_the_example_agents_have_the_tools_the_expert_was_tested_with(
    file: str, tools: tuple[Tool, ...]
) -> None:
    listed = yaml.safe_load((EXAMPLES / "workspace" / file).read_text())["tools"]
    assert [load_tool(entry["binding"]) for entry in listed] == list(tools)


# ---- over HTTP ----------------------------------------------------------------------------------------------


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with serve_expert() as served:
        yield served


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def request(prompt: str, **more: object) -> dict[str, object]:
    tools = [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
        }
        for t in LEAD_SPECS
    ]
    messages = [{"role": "system", "content": "Work."}, {"role": "user", "content": prompt}]
    return {
        "model": "expert",
        "messages": messages,
        "tools": tools,
        "temperature": 0.0,
        "return_token_ids": True,
    } | more


async def test_the_endpoint_answers_with_native_tool_calls_under_the_callers_id(
    url: str, http: aiohttp.ClientSession
) -> None:
    headers = {"X-Nexactor-Call-Id": "agent/r@2.0"}
    async with http.post(
        f"{url}/chat/completions", json=request("Delete a.txt."), headers=headers
    ) as response:
        assert response.status == 200
        body = await response.json()
    assert body["id"] == "agent/r@2.0"
    assert body["model"] == "expert"
    assert "prompt_token_ids" not in body
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["id"] == "agent/r@2.0-0"
    assert call["function"] == {"name": "worker", "arguments": '{"message": "Delete a.txt."}'}


async def test_the_openai_sdk_plays_a_whole_conversation(url: str) -> None:
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        body = request("Append the number of lines of a.txt to b.txt.")
        messages = list(body["messages"])  # type: ignore[call-overload]
        for name, result in (("count_lines", "3"), ("append_file", "ok")):
            answer = await client.chat.completions.create(
                model="expert", messages=messages, tools=body["tools"]
            )  # type: ignore[call-overload]
            message = answer.choices[0].message
            assert message.tool_calls[0].function.name == name
            messages += [
                message.model_dump(),
                {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result},
            ]
        stream = await client.chat.completions.create(model="expert", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "done"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (request("Tell me a joke."), 422, "Tell me a joke."),
        ({"messages": "x"}, 400, "Expected `array`, got `str` - at `$.messages`"),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "Invalid enum value 'king'"),
    ],
)
async def test_what_the_expert_does_not_know_is_a_clear_http_error(
    url: str, http: aiohttp.ClientSession, body: dict[str, object], status: int, message: str
) -> None:
    async with http.post(f"{url}/chat/completions", json=body) as response:
        assert response.status == status
        assert message in (await response.json())["error"]["message"]


async def test_the_endpoint_says_that_it_is_well_and_what_it_serves(
    url: str, http: aiohttp.ClientSession
) -> None:
    async with http.get(f"{url.removesuffix('/v1')}/healthz") as response:
        assert (await response.json())["status"] == "ok"
    async with http.get(f"{url}/models") as response:
        assert [m["id"] for m in (await response.json())["data"]] == ["expert"]


async def test_a_taken_port_is_a_clear_error(url: str) -> None:
    port = int(url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        async with serve_expert(port):
            pass


async def test_it_serves_as_a_process_of_its_own_and_refuses_a_taken_port(
    http: aiohttp.ClientSession,
) -> None:
    command = (sys.executable, "-m", "nexactor.tools.expert_server", "--port")
    process = await asyncio.create_subprocess_exec(*command, "0", stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        started = json.loads(await process.stdout.readline())
        async with http.get(f"{started['url']}/models") as response:
            assert response.status == 200
        port = started["url"].rpartition(":")[2].partition("/")[0]
        second = await asyncio.create_subprocess_exec(*command, port, stderr=asyncio.subprocess.PIPE)
        _, errors = await second.communicate()
        assert second.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}" in errors.decode()
        assert "Traceback" not in errors.decode()
    finally:
        process.terminate()
        await process.communicate()
