"""The text format of tool calls: what is rendered parses back, and what does not parse is reported."""

from __future__ import annotations

import json

import pytest

from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.events.toolformat import (
    as_text_messages,
    parse_answer,
    render_answer,
    render_call,
    render_tools,
    to_tool_calls,
)

READ = ToolSpec(
    name="read",
    description="Read a file.\nMore about it.",
    parameters={"type": "object", "properties": {"path": {}, "lines": {}}, "required": ["path"]},
)


def test_a_rendered_call_parses_back() -> None:
    arguments = json.dumps({"path": 'a "quoted" </b> ü\n', "lines": [1, 2]})
    parsed = parse_answer(render_call("read", arguments))
    ((name, found),) = parsed.calls
    assert (name, json.loads(found)) == ("read", json.loads(arguments))
    assert (parsed.content, parsed.errors) == ("", ())


def test_prose_and_several_calls_are_told_apart() -> None:
    answer = Message("assistant", "First.", (ToolCall("1", "a", "{}"), ToolCall("2", "b", '{"x": 1}')))
    parsed = parse_answer(render_answer(answer))
    assert parsed.content == "First."
    assert parsed.calls == (("a", "{}"), ("b", '{"x": 1}'))
    assert [c.id for c in to_tool_calls(parsed, "call")] == ["call-0", "call-1"]


def test_a_call_cut_off_before_its_closing_tag_counts_if_it_is_whole() -> None:
    assert parse_answer('<tool_call>{"name": "a", "arguments": {}}').calls == (("a", "{}"),)


@pytest.mark.parametrize(
    "text", ["{", '{"arguments": {}}', '{"name": 7}', '{"name": "a", "arguments": []}', '["name"]', "null"]
)
def test_a_call_that_does_not_parse_is_reported_not_repaired(text: str) -> None:
    parsed = parse_answer(f"before <tool_call>{text}</tool_call> after")
    assert parsed.calls == ()
    assert len(parsed.errors) == 1


def test_tools_are_listed_one_a_line_with_an_example() -> None:
    lines = render_tools([READ]).splitlines()
    assert "- read(path, lines?): Read a file." in lines
    assert parse_answer(lines[-1]).calls[0][0] == "read"
    assert "- bare(): " in render_tools([ToolSpec("bare", "", {"type": "object"})]).splitlines()
    assert render_tools([]) == ""


def test_tools_join_the_system_message_or_make_one() -> None:
    system, user = Message("system", "Be brief."), Message("user", "Hello")
    with_system = as_text_messages([system, user], [READ])
    assert [m["role"] for m in with_system] == ["system", "user"]
    assert with_system[0]["content"].startswith("Be brief.\n")
    assert render_tools([READ]) in with_system[0]["content"]
    without = as_text_messages([user], [READ])
    assert [m["role"] for m in without] == ["system", "user"]
    assert as_text_messages([system, user], []) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_an_assistants_calls_become_text() -> None:
    calls = Message("assistant", tool_calls=(ToolCall("1", "read", '{"path": "x"}'),))
    (only,) = as_text_messages([calls], [])
    assert only == {"role": "assistant", "content": render_call("read", '{"path": "x"}')}
