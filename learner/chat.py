"""What goes over the wire: OpenAI requests in, answers, streams and errors out. Pure functions, no server.

Shapes follow https://platform.openai.com/docs/api-reference/chat and vLLM's `return_token_ids`; ours on top: the call
id is the answer's `id`, and every answer carries `policy_version` and `reattached`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import msgspec

from nexactor.events.errors import NexactorError
from nexactor.events.ids import digest
from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.events.toolformat import CLOSE, OPEN, parse_answer, to_tool_calls
from nexactor.learner.answers import Answer

_T = TypeVar("_T")
_CALL = re.compile(f"{re.escape(OPEN)}.*?(?:{re.escape(CLOSE)}|\\Z)", re.S)


class RequestError(NexactorError):
    """A request the server refuses: HTTP `status`, and OpenAI's `code` and `param`."""

    def __init__(self, message: str, *, status: int = 400, code: str = "", param: str = "") -> None:
        self.status, self.code, self.param = status, code, param
        super().__init__(message)


class Ask(msgspec.Struct, frozen=True):
    """A request, understood. `prompt` is set for plain completions (text or ids), `messages` for chats."""

    call_id: str
    named: bool
    previous: str
    model: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    prompt: str | tuple[int, ...] | None
    parse_tools: bool
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    stream_usage: bool
    logprobs: bool
    token_ids: bool

    @property
    def request(self) -> str:
        """The digest of what was asked: a call id stands for this, and only this."""
        return digest([self.messages, self.tools, self.prompt])

    @property
    def tools_digest(self) -> str:
        """The digest of the tool list."""
        return digest(self.tools)


class _Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class _ToolCall(msgspec.Struct):
    function: _Function
    id: str = ""


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _ToolFunction(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct):
    function: _ToolFunction
    type: Literal["function"] = "function"


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Format(msgspec.Struct):
    type: str = "text"


class _Request(msgspec.Struct):
    """What both endpoints take; what is not named here is accepted and has no effect."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    return_token_ids: bool | None = None


class _ChatRequest(_Request, kw_only=True):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    response_format: _Format | None = None


class _CompletionRequest(_Request, kw_only=True):
    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


def parse_chat(body: bytes, *, call_id: str, named: bool, previous: str) -> Ask:
    """A /v1/chat/completions body. Raises RequestError that names the field."""
    raw = _decode(body, _ChatRequest)
    if raw.tool_choice not in (None, "auto", "none"):
        raise RequestError("tool_choice must be 'auto' or 'none': the policy decides", param="tool_choice")
    if raw.response_format is not None and raw.response_format.type != "text":
        raise RequestError(
            "response_format must be 'text': output is not constrained", param="response_format"
        )
    if not raw.messages:
        raise RequestError("messages is empty: give at least one", param="messages")
    tools = tuple(
        ToolSpec(t.function.name, t.function.description or "", t.function.parameters or {"type": "object"})
        for t in raw.tools or ()
    )
    return _ask(
        raw,
        call_id=call_id,
        named=named,
        previous=previous,
        messages=tuple(_message(m) for m in raw.messages),
        tools=tools,
        prompt=None,
        parse_tools=bool(tools) and raw.tool_choice != "none",
        logprobs=bool(raw.logprobs),
        max_tokens=raw.max_tokens if raw.max_completion_tokens is None else raw.max_completion_tokens,
    )


def parse_completion(body: bytes, *, call_id: str, named: bool) -> Ask:
    """A /v1/completions body: one prompt, as text or as token ids. Raises RequestError."""
    raw = _decode(body, _CompletionRequest)
    if raw.echo:
        raise RequestError("echo is not supported", param="echo")
    prompt: Any = raw.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if not isinstance(prompt, str) and not all(isinstance(i, int) for i in prompt):
        raise RequestError("prompt must be one text or one list of token ids", param="prompt")
    return _ask(
        raw,
        call_id=call_id,
        named=named,
        previous="",
        messages=(),
        tools=(),
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        parse_tools=False,
        logprobs=raw.logprobs is not None,
        max_tokens=16 if raw.max_tokens is None else raw.max_tokens,
    )


def _ask(raw: _Request, **rest: Any) -> Ask:
    temperature = 1.0 if raw.temperature is None else raw.temperature
    top_p = 1.0 if raw.top_p is None else raw.top_p
    stop = (raw.stop,) if isinstance(raw.stop, str) else tuple(raw.stop or ())
    limits: list[tuple[str, bool, str]] = [
        ("temperature", 0 <= temperature <= 100, "from 0 to 100"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("n", raw.n in (None, 1), "1: ask several times, the shared prompt is computed once"),
        ("max_tokens", rest["max_tokens"] is None or rest["max_tokens"] >= 1, "at least 1"),
        ("stop", all(stop) and len(stop) <= 16, "up to 16 strings that are not empty"),
    ]
    for name, fine, wanted in limits:
        if not fine:
            raise RequestError(f"{name} must be {wanted}", param=name)
    return Ask(
        model=raw.model,
        temperature=temperature,
        top_p=top_p,
        seed=raw.seed,
        stop=stop,
        stream=bool(raw.stream),
        stream_usage=raw.stream_options is not None and raw.stream_options.include_usage,
        token_ids=bool(raw.return_token_ids),
        **rest,
    )


def _decode(body: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.DecodeError as error:
        where = re.search(r"`\$\.?(\w+)", str(error))
        raise RequestError(
            f"the request body is wrong: {error}", param=where.group(1) if where else ""
        ) from None


def _message(m: _Message) -> Message:
    if isinstance(m.content, list):
        if any(p.type not in ("text", "refusal") for p in m.content):
            raise RequestError("the policy reads text only: messages hold other content", param="messages")
        content = "".join(p.text or "" for p in m.content)
    else:
        content = m.content or ""
    return Message(
        "system" if m.role == "developer" else m.role,
        content,
        tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in m.tool_calls or ()),
        m.tool_call_id or "",
    )


# ---- answers --------------------------------------------------------------------------------------------


def answer_message(text: str, *, parse_tools: bool, call_id: str) -> Message:
    """The assistant message that a text is: calls become tool calls, one that does not parse stays in the text."""
    if not parse_tools or OPEN not in text:
        return Message("assistant", text.strip() if parse_tools else text)
    kept = _CALL.sub(lambda m: m.group() if parse_answer(m.group()).errors else "", text)
    return Message("assistant", kept.strip(), to_tool_calls(parse_answer(text), call_id))


def stable(text: str, *, stop: Sequence[str], parse_tools: bool) -> str:
    """The start of an unfinished answer's content that no later token can change.

    Held back: an incomplete character, what may become a stop string or a tool call, and, where calls are parsed,
    blanks at the end (they are stripped from the content).
    """
    markers = [*stop, *([OPEN] if parse_tools else [])]
    for marker in markers:
        text = text.split(marker, 1)[0]
    text = text.rstrip("\ufffd")
    held = max((_overlap(text, marker) for marker in markers), default=0)
    text = text[: len(text) - held]
    return text.strip() if parse_tools else text


def _overlap(text: str, marker: str) -> int:
    """The longest end of `text` that is a proper start of `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


class Shape:
    """How answers to one request look. `token_text` gives the text of one id."""

    def __init__(self, ask: Ask, model: str, created: int, token_text: Callable[[int], str]) -> None:
        self._ask, self._model, self._created, self._text = ask, model, created, token_text
        self._chat = ask.prompt is None

    def whole(self, answer: Answer, *, reattached: bool) -> dict[str, Any]:
        """A chat completion or a text completion."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
        if self._chat:
            assert answer.message is not None
            choice["message"] = _wire_message(answer.message)
        else:
            choice["text"] = answer.text
        self._add_tokens(choice, answer.ids, answer.logprobs)
        return {
            **self._head("chat.completion" if self._chat else "text_completion"),
            "choices": [choice],
            "usage": _usage(answer),
            **({"prompt_token_ids": answer.prompt_ids} if self._ask.token_ids else {}),
            "policy_version": answer.policy_version,
            "reattached": reattached,
        }

    def first(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """The chunk that opens a stream."""
        chunk = self._chunk({"role": "assistant", "content": ""} if self._chat else "")
        if self._ask.token_ids:
            chunk["prompt_token_ids"] = list(prompt_ids)
        return chunk

    def more(self, text: str, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        """A chunk of newly stable text and newly sampled tokens; None if it would say nothing."""
        wants_tokens = self._ask.token_ids or self._ask.logprobs
        if not text and not (ids and wants_tokens):
            return None
        chunk = self._chunk(({"content": text} if text else {}) if self._chat else text)
        self._add_tokens(chunk["choices"][0], ids, logprobs)
        return chunk

    def last(self, answer: Answer, *, reattached: bool) -> Iterator[dict[str, Any]]:
        """The chunks that end a stream: tool calls, finish reason, usage."""
        calls = answer.message.tool_calls if answer.message is not None else ()
        for i, call in enumerate(calls):
            yield self._chunk({"tool_calls": [{"index": i, **_wire_call(call)}]})
        chunk = self._chunk({} if self._chat else "", answer.finish_reason)
        yield {**chunk, "policy_version": answer.policy_version, "reattached": reattached}
        if self._ask.stream_usage:
            kind = "chat.completion.chunk" if self._chat else "text_completion"
            yield {**self._head(kind), "choices": [], "usage": _usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._ask.call_id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, delta: Any, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, ("delta" if self._chat else "text"): delta, "finish_reason": finish_reason}
        return {
            **self._head("chat.completion.chunk" if self._chat else "text_completion"),
            "choices": [choice],
        }

    def _add_tokens(self, choice: dict[str, Any], ids: Sequence[int], logprobs: Sequence[float]) -> None:
        if self._ask.token_ids:
            choice["token_ids"] = list(ids)
        if not self._ask.logprobs:
            return
        texts = [self._text(i) for i in ids]
        if self._chat:
            content = [
                {"token": t, "logprob": p, "bytes": list(t.encode()), "top_logprobs": []}
                for t, p in zip(texts, logprobs, strict=True)
            ]
            choice["logprobs"] = {"content": content, "refusal": None}
        else:
            choice["logprobs"] = {"tokens": texts, "token_logprobs": list(logprobs), "top_logprobs": None}


def error_body(error: Exception) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    status = getattr(error, "status", 500)
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if status < 500 and status != 429 else "server_error",
            "param": getattr(error, "param", "") or None,
            "code": getattr(error, "code", "") or None,
        }
    }


def _wire_message(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.tool_calls:
        out["tool_calls"] = [_wire_call(c) for c in message.tool_calls]
    return out


def _wire_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, sampled = len(answer.prompt_ids), len(answer.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }
