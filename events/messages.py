"""What a model reads and writes: chat messages, tool calls, tool specifications, token traces.

These are the structs that events store and that every room exchanges; they mirror the OpenAI chat-completions
shapes (https://platform.openai.com/docs/api-reference/chat) without depending on its SDK.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tool call a model asked for; `arguments` is the JSON text exactly as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message. `tool_calls` only on assistant messages, `tool_call_id` only on tool messages."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    reasoning: str = ""


class ToolSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool as a model sees it; `parameters` is a JSON Schema of type object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts of one model call, as the endpoint reported them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class TokenTrace(msgspec.Struct, frozen=True, omit_defaults=True):
    """The exact tokens of one model call.

    `prompt_keep` counts the tokens kept from the same agent's previous call (its prompt ids followed by its
    sampled ids); `prompt_ids` are the prompt's tokens after those. `ids` were sampled, `logprobs` are theirs under
    the sampling policy. Arrays are little-endian bytes (uint32 ids, float32 log-probabilities) so that
    readers go to numpy without an object a token.
    """

    prompt_keep: int
    prompt_ids: bytes
    ids: bytes
    logprobs: bytes
    tokenizer: str = ""
