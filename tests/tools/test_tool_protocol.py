"""A typed function becomes a tool: schema, validation, limits, errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexactor.events.errors import ConfigError
from nexactor.tools import Tool, ToolContext, ToolError, ToolResult, tool

CONTEXT = ToolContext(effect_id="agent/r@1.0", run="r", agent="agent/r")


class Point(msgspec.Struct):
    x: int
    y: int = 0


@tool(repeat="safe", timeout=5.0, output_limit=100)
async def add(
    a: int, b: Annotated[int, msgspec.Meta(description="the second number")] = 2, *, context: ToolContext
) -> dict[str, Any]:
    """Add two numbers.

    More that no model reads.
    """
    return {"sum": a + b, "effect": context.effect_id}


@tool
def shout(text: str) -> str:
    """Shout."""
    return text.upper()


@tool
def place(at: Point, tags: list[str], mode: Literal["fast", "slow"] = "fast") -> Point:
    """Place something."""
    return at


@tool(output_limit=10)
def long(n: int) -> str:
    return "x" * n


@tool
async def broken(kind: str) -> str:
    """Fail."""
    if kind == "tool":
        raise ToolError("do it another way")
    if kind == "exit":
        raise SystemExit(3)
    if kind == "cancel":
        raise asyncio.CancelledError
    raise ValueError("bad luck")


async def test_the_schema_comes_from_the_signature_and_hides_the_context() -> None:
    assert add.spec.name == "add"
    assert add.spec.description == "Add two numbers."
    assert add.spec.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "integer", "default": 2, "description": "the second number"},
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    assert (add.repeat, add.timeout, add.output_limit) == ("safe", 5.0, 100)
    assert add.binding == f"{__name__}:add"


async def test_properties_keep_the_order_of_the_signature() -> None:
    assert list(place.spec.parameters["properties"]) == ["at", "tags", "mode"]


async def test_nested_types_are_defined_inside_of_the_schema() -> None:
    assert place.spec.parameters["properties"]["at"] == {"$ref": "#/$defs/Point"}
    assert place.spec.parameters["$defs"]["Point"]["required"] == ["x"]


async def test_a_tool_is_never_repeated_unless_it_says_so() -> None:
    assert shout.repeat == "never"


async def test_a_tool_is_still_the_plain_function() -> None:
    assert shout("a") == shout.function("a") == "A"


async def test_asynchronous_and_synchronous_functions_run() -> None:
    assert json.loads((await add.run('{"a": 1}', CONTEXT)).text) == {"sum": 3, "effect": "agent/r@1.0"}
    assert await shout.run('{"text": "hi"}', CONTEXT) == ToolResult("HI")


async def test_a_synchronous_function_does_not_run_in_the_event_loops_thread() -> None:
    @tool
    def where() -> int:
        return threading.get_ident()

    assert int((await where.run("", CONTEXT)).text) != threading.get_ident()


async def test_results_that_are_not_text_become_json() -> None:
    result = await place.run('{"at": {"x": 1}, "tags": []}', CONTEXT)
    assert result.text == '{"x":1,"y":0}'


async def test_a_result_that_json_cannot_hold_is_a_tool_error() -> None:
    @tool
    def odd() -> object:
        return object()

    with pytest.raises(ToolError, match="odd ran, but its result cannot be written as JSON"):
        await odd.run("{}", CONTEXT)


@pytest.mark.parametrize(
    ("chosen", "arguments", "message"),
    [
        (add, "{}", "add: Object missing required field `a`. Valid fields: a (integer), b? (integer)"),
        (
            add,
            '{"a": "1"}',
            "add: Expected `int`, got `str` - at `$.a`. Valid fields: a (integer), b? (integer)",
        ),
        (
            add,
            '{"a": 1, "c": 2}',
            "add: Object contains unknown field `c`. Valid fields: a (integer), b? (integer)",
        ),
        (add, '{"a": 1, "context": {}}', "unknown field `context`"),
        (add, '{"a": 1', "add: the arguments are not JSON (Input data was truncated)"),
        (add, "[1]", "add: Expected `object`, got `array`"),
        (add, "null", "add: Expected `object`, got `null`"),
        (place, '{"at": {"x": "1"}, "tags": []}', "place: Expected `int`, got `str` - at `$.at.x`"),
        (place, '{"at": {"x": 1}, "tags": ["a", 2]}', "Expected `str`, got `int` - at `$.tags[1]`"),
        (place, '{"at": {"x": 1}, "tags": [], "mode": "no"}', "mode? ('fast'|'slow')"),
        (add, '{"a": "\ud800"}', "add: "),
    ],
)
async def test_wrong_arguments_are_answered_with_path_type_and_valid_fields(
    chosen: Tool, arguments: str, message: str
) -> None:
    with pytest.raises(ToolError) as caught:
        await chosen.run(arguments, CONTEXT)
    assert message in str(caught.value)


@given(st.text())
def test_no_argument_text_whatever_breaks_a_tool(text: str) -> None:
    with contextlib.suppress(ToolError):
        asyncio.run(add.run(text, CONTEXT))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tool", "do it another way"),
        ("value", "ValueError: bad luck"),
        ("exit", "SystemExit: 3"),
        ("cancel", "broken cancelled itself"),
    ],
)
async def test_whatever_a_function_raises_is_a_tool_error(kind: str, message: str) -> None:
    with pytest.raises(ToolError) as caught:
        await broken.run(json.dumps({"kind": kind}), CONTEXT)
    assert str(caught.value) == message


async def test_output_is_cut_at_the_limit_with_a_notice_and_a_count() -> None:
    assert await long.run('{"n": 10}', CONTEXT) == ToolResult("x" * 10)
    assert await long.run('{"n": 25}', CONTEXT) == ToolResult("x" * 10 + "\n[15 more characters cut]", 15)


async def test_an_error_text_is_cut_too() -> None:
    @tool(output_limit=10)
    def fail() -> str:
        raise ValueError("y" * 100)

    with pytest.raises(ToolError, match="102 more characters cut"):
        await fail.run("{}", CONTEXT)


async def test_a_result_can_be_stored_even_with_lone_surrogates() -> None:
    @tool
    def odd() -> str:
        return "a\ud800b"

    assert (await odd.run("{}", CONTEXT)).text == "a?b"


async def test_a_slow_tool_is_stopped_at_its_time_limit() -> None:
    stopped = asyncio.Event()

    @tool(timeout=0.01)
    async def wait() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "never"

    with pytest.raises(ToolError, match=r"wait was stopped: it took longer than 0\.01 seconds"):
        await wait.run("{}", CONTEXT)
    assert stopped.is_set()


async def test_a_functions_own_timeout_error_is_not_taken_for_the_time_limit() -> None:
    @tool
    async def fetch() -> str:
        raise TimeoutError("server silent")

    with pytest.raises(ToolError, match="TimeoutError: server silent"):
        await fetch.run("{}", CONTEXT)


async def test_a_blocked_thread_does_not_hold_the_caller_beyond_the_time_limit() -> None:
    release = threading.Event()

    @tool(timeout=0.01)
    def block() -> str:
        release.wait()
        return "late"

    try:
        with pytest.raises(ToolError, match="took longer"):
            await block.run("{}", CONTEXT)
    finally:
        release.set()


async def test_cancellation_passes_through_and_stops_the_work() -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    @tool
    async def wait() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return "never"

    async with asyncio.TaskGroup() as group:
        task = group.create_task(wait.run("{}", CONTEXT))
        await started.wait()
        task.cancel()
    assert task.cancelled()
    assert stopped.is_set()


def test_functions_that_cannot_be_tools_are_refused_with_the_reason() -> None:
    def untyped(a) -> str:  # type: ignore[no-untyped-def]
        return str(a)

    def many(*a: int) -> str:
        return str(a)

    def strange(a: threading.Thread) -> str:
        return str(a)

    for function, message in (
        (untyped, "parameter a has no type annotation"),
        (many, "has no place in a JSON object"),
        (strange, "cannot be described as JSON"),
    ):
        with pytest.raises(ConfigError, match=message):
            tool(function)
    with pytest.raises(ConfigError, match="repeat='often' is not one of safe, idempotent, never"):
        tool(repeat="often")(shout.function)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="above zero"):
        tool(timeout=0)(shout.function)


def test_a_name_can_be_given_and_no_docstring_is_needed() -> None:
    named = tool(name="say_it")(shout.function)
    assert named.name == "say_it"
    assert named.binding.endswith(":shout")
    assert long.spec.description == "long"
