"""Requests understood and answers shaped, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.learner.chat import (
    Ask,
    RequestError,
    answer_message,
    parse_chat,
    parse_completion,
    stable,
)


def chat(**body: Any) -> Ask:
    body = {"messages": [{"role": "user", "content": "x"}]} | body
    return parse_chat(json.dumps(body).encode(), call_id="c", named=True, previous="")


def test_messages_of_every_role_are_understood() -> None:
    ask = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "42", "name": "f"},
        ]
    )
    assert ask.messages == (
        Message("system", "be brief"),
        Message("user", "ab"),
        Message("assistant", "", (ToolCall("t1", "f", '{"a":1}'),)),
        Message("tool", "42", tool_call_id="t1"),
    )


def test_tools_become_specifications() -> None:
    parameters = {"type": "object", "properties": {"a": {}}}
    ask = chat(
        tools=[{"type": "function", "function": {"name": "f", "description": "F.", "parameters": parameters}}]
    )
    assert ask.tools == (ToolSpec("f", "F.", parameters),)
    assert ask.parse_tools
    assert not chat().parse_tools


def test_parameters_this_server_does_not_know_are_accepted() -> None:
    assert chat(user="me", parallel_tool_calls=True, max_completion_tokens=7).max_tokens == 7


def test_how_it_is_sampled_does_not_change_what_a_call_id_stands_for() -> None:
    assert chat(seed=1, stream=True).request == chat(seed=2).request
    assert chat(messages=[{"role": "user", "content": "y"}]).request != chat().request


def test_an_image_is_refused() -> None:
    with pytest.raises(RequestError, match="text only"):
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a", "a"), (["a"], "a"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))]
)
def test_a_completion_has_one_prompt(prompt: Any, expected: Any) -> None:
    body = json.dumps({"prompt": prompt}).encode()
    assert parse_completion(body, call_id="c", named=False).prompt == expected


def test_several_prompts_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion(b'{"prompt": ["a", "b"]}', call_id="c", named=False)
    assert caught.value.param == "prompt"


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def test_a_tool_call_in_the_text_becomes_native() -> None:
    message = answer_message(f"I look.\n{CALL}", parse_tools=True, call_id="c")
    assert message == Message("assistant", "I look.", (ToolCall("c-0", "f", '{"a": 1}'),))


def test_a_call_that_does_not_parse_stays_in_the_text() -> None:
    broken = '<tool_call>{"name": "f", "arguments": </tool_call>'
    assert answer_message(broken, parse_tools=True, call_id="c") == Message("assistant", broken)
    both = answer_message(broken + CALL, parse_tools=True, call_id="c")
    assert (both.content, len(both.tool_calls)) == (broken, 1)


def test_without_tools_the_text_is_left_as_it_is() -> None:
    text = f"  {CALL} "
    assert answer_message(text, parse_tools=False, call_id="c") == Message("assistant", text)


pieces = st.lists(
    st.sampled_from(["a", " ", "<tool", "_call>", "END", "E", "\ufffd", "\n", CALL]), max_size=12
)


@given(pieces=pieces, tools=st.booleans())
def test_what_a_stream_has_shown_is_the_start_of_the_final_content(pieces: list[str], tools: bool) -> None:
    stop = "END"
    text = "".join(pieces)
    cut = text.split(stop, 1)[0]
    final = answer_message(cut, parse_tools=tools, call_id="c").content
    for n in range(len(pieces) + 1):
        shown = stable("".join(pieces[:n]), stop=[stop], parse_tools=tools)
        assert final.startswith(shown)
