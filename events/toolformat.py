"""Text formats of tool calls, in one place: what a model that speaks plain text reads and writes.

Endpoints with native tool calling need none of this. The policy server, the expert and the learner do, and must agree
to the token; so the format lives in the lowest room. The format is Hermes' (`<tool_call>{json}</tool_call>`, as
Qwen2.5 and SmolLM2 were taught), with tools listed as one-line signatures: a JSON Schema a tool would cost
a small model most of its context.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from nexactor.events.messages import Message, ToolCall, ToolSpec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)


class ParsedAnswer(msgspec.Struct, frozen=True):
    """A model's text split into prose, calls (name and argument JSON), and calls that did not parse."""

    content: str
    calls: tuple[tuple[str, str], ...]
    errors: tuple[str, ...]


def render_tools(tools: Sequence[ToolSpec]) -> str:
    """The section of the system prompt that lists tools and states the call format with an example."""
    if not tools:
        return ""
    lines = ["Tools:"]
    for tool in tools:
        properties: dict[str, Any] = tool.parameters.get("properties", {})
        required = set(tool.parameters.get("required", ()))
        names = ", ".join(n if n in required else f"{n}?" for n in properties)
        lines.append(f"- {tool.name}({names}): {(tool.description.strip().splitlines() or [''])[0]}")
    example = tools[0]
    arguments = dict.fromkeys(example.parameters.get("properties", {}), "...")
    lines.append("Call a tool by answering only, for example:")
    lines.append(render_call(example.name, json.dumps(arguments)))
    return "\n".join(lines)


def render_call(name: str, arguments: str) -> str:
    """One call as text. `arguments` is JSON text and is kept as it is when it parses, so ids stay exact."""
    return f'{OPEN}{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}{CLOSE}'


def render_answer(message: Message) -> str:
    """An assistant message as the text a model would have written."""
    calls = "\n".join(render_call(c.name, c.arguments) for c in message.tool_calls)
    return "\n".join(part for part in (message.content, calls) if part)


def parse_answer(text: str) -> ParsedAnswer:
    """Split a model's text into prose and tool calls. A call that is not valid JSON is reported, not repaired."""
    calls: list[tuple[str, str]] = []
    errors: list[str] = []
    for match in _CALL.finditer(text):
        try:
            value = json.loads(match.group(1))
            name, arguments = value["name"], value.get("arguments", {})
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise TypeError("name must be a string and arguments an object")
        except (ValueError, KeyError, TypeError) as error:
            errors.append(f"{error.__class__.__name__}: {error}")
            continue
        calls.append((name, json.dumps(arguments, ensure_ascii=False)))
    return ParsedAnswer(_CALL.sub("", text).strip(), tuple(calls), tuple(errors))


def as_text_messages(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[dict[str, str]]:
    """Messages for a chat template that knows no tools: tools go into the system message, calls into text."""
    listing = render_tools(tools)
    out: list[dict[str, str]] = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            content = render_answer(message)
        elif message.role == "system" and i == 0 and listing:
            content = f"{message.content}\n{listing}" if message.content else listing
        else:
            content = message.content
        out.append({"role": message.role, "content": content})
    if listing and not (messages and messages[0].role == "system"):
        out.insert(0, {"role": "system", "content": listing})
    return out


def to_tool_calls(parsed: ParsedAnswer, call_id: str) -> tuple[ToolCall, ...]:
    """Tool calls with ids that derive from the model call's id, so that a repeated answer repeats them."""
    return tuple(ToolCall(f"{call_id}-{i}", n, a) for i, (n, a) in enumerate(parsed.calls))
