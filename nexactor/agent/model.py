"""The model client: chat completions over the `openai` SDK, token ids where the endpoint returns them.

The call id travels in headers, which other endpoints ignore; our policy server (and proxy) keep answers by it, so that
a call in flight when its agent died is re-attached instead of paid for twice.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from nexactor.events.errors import ConfigError, NexactorError
from nexactor.events.messages import Message, TokenTrace, ToolCall, ToolSpec, Usage
from nexactor.spec import LLMConfig, expand_env

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CALL_ID = "X-Nexactor-Call-Id"
PREVIOUS_CALL_ID = "X-Nexactor-Previous-Call-Id"
REASONING_CHUNK = 2000
"""Characters of streamed reasoning that go into one ReasoningStep event."""


class ModelError(NexactorError):
    """The endpoint gave no usable answer; `attempts` requests were sent. `infra`: see ModelCallFailed."""

    def __init__(self, text: str, attempts: int, *, infra: bool = True) -> None:
        super().__init__(text)
        self.attempts = attempts
        self.infra = infra


class Answer(msgspec.Struct, frozen=True):
    """What a model call gave."""

    message: Message
    finish_reason: str
    usage: Usage
    model: str
    policy_version: str
    tokens: TokenTrace | None
    attempts: int
    reattached: bool


class ModelClient:
    """Calls OpenAI-compatible endpoints, one connection pool an endpoint, at most `concurrency` calls at once."""

    def __init__(self, *, concurrency: int = 256) -> None:
        self._clients: dict[tuple[str, str, float, int], AsyncOpenAI] = {}
        self._limit = asyncio.Semaphore(concurrency)

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()
        self._clients.clear()

    async def call(
        self,
        config: LLMConfig,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        *,
        call_id: str,
        previous_call_id: str = "",
        previous_tokens: bytes = b"",
        on_reasoning: Callable[[str], Awaitable[None]] | None = None,
    ) -> Answer:
        """Ask the model once (the SDK repeats what may be repeated). Raises ModelError.

        `previous_tokens` are this agent's previous call's ids (uint32 LE): the answer's TokenTrace is relative to them.
        """
        import openai

        try:
            client = self._client(config)
        except ConfigError as error:
            raise ModelError(str(error), 0) from error
        headers = {CALL_ID: call_id}
        if previous_call_id:
            headers[PREVIOUS_CALL_ID] = previous_call_id
        request: dict[str, Any] = {
            "model": config.model,
            "messages": [to_openai(m) for m in messages],
            **config.params,
            "extra_headers": headers,
        }
        if tools:
            request["tools"] = [{"type": "function", "function": msgspec.to_builtins(t)} for t in tools]
        if config.token_ids:
            request |= {"logprobs": True, "extra_body": {"return_token_ids": True}}
        attempts = 1
        async with self._limit:
            try:
                if config.stream:
                    body = await _streamed(client, request, on_reasoning)
                else:
                    raw = await client.chat.completions.with_raw_response.create(**request)
                    attempts += raw.retries_taken
                    body = msgspec.json.decode(raw.content)
            except openai.APIStatusError as error:
                too_long = error.code == "context_length_exceeded"
                raise ModelError(_refused(config, error), attempts, infra=not too_long) from error
            except openai.APIConnectionError as error:
                raise ModelError(
                    f"the endpoint {client.base_url} did not answer after {config.max_retries + 1} tries: "
                    f"{error.__cause__ or error}",
                    config.max_retries + 1,
                ) from error
            except (openai.OpenAIError, msgspec.DecodeError) as error:
                raise ModelError(f"the endpoint {client.base_url}: {error}", attempts) from error
        return _answer(body, attempts, previous_tokens, str(client.base_url))

    def _client(self, config: LLMConfig) -> AsyncOpenAI:
        import openai

        key = expand_env(config.api_key, "llm_config.api_key") if config.api_key else ""
        at = (config.base_url, key, config.timeout, config.max_retries)
        client = self._clients.get(at)
        if client is None:
            try:
                client = openai.AsyncOpenAI(
                    base_url=config.base_url or None,
                    api_key=key or ("none" if config.base_url else None),
                    timeout=config.timeout,
                    max_retries=config.max_retries,
                )
            except openai.OpenAIError as error:
                raise ModelError(
                    f"no endpoint to call: {error}\n  set llm_config.base_url and api_key, or OPENAI_API_KEY",
                    0,
                ) from error
            self._clients[at] = client
        return client


def to_openai(message: Message) -> dict[str, Any]:
    """A message in the chat-completions request shape."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.role == "tool":
        out["tool_call_id"] = message.tool_call_id
    return out


def _refused(config: LLMConfig, error: Any) -> str:
    text = str(getattr(error, "message", error))
    endpoint = config.base_url or "of OpenAI"
    return f"the endpoint {endpoint} refused the call to {config.model} (HTTP {error.status_code}): {text}"


def _answer(body: dict[str, Any], attempts: int, previous: bytes, endpoint: str) -> Answer:
    try:
        choice = body["choices"][0]
        said = choice["message"]
        message = Message(
            "assistant",
            said.get("content") or "",
            tool_calls=_unique(
                ToolCall(c["id"] or "call", c["function"]["name"], c["function"]["arguments"] or "{}")
                for c in said.get("tool_calls") or ()
            ),
            reasoning=said.get("reasoning_content") or said.get("reasoning") or "",
        )
        usage = body.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            message,
            choice.get("finish_reason") or "",
            Usage(
                usage.get("prompt_tokens") or 0,
                usage.get("completion_tokens") or 0,
                details.get("cached_tokens") or 0,
            ),
            body.get("model") or "",
            body.get("policy_version") or "",
            _trace(body, choice, previous),
            attempts,
            bool(body.get("reattached")),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"the endpoint {endpoint} answered in another shape than chat completions: {error!r}", attempts
        ) from error


def _unique(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Calls with different ids: some endpoints give several calls of an answer the same one."""
    seen: dict[str, int] = {}
    out = []
    for c in calls:
        n = seen[c.id] = seen.get(c.id, -1) + 1
        out.append(msgspec.structs.replace(c, id=f"{c.id}-{n}") if n else c)
    return tuple(out)


def _trace(body: dict[str, Any], choice: dict[str, Any], previous: bytes) -> TokenTrace | None:
    prompt = body.get("prompt_token_ids") or choice.get("prompt_token_ids")
    ids = choice.get("token_ids")
    if not prompt or ids is None:
        return None
    packed = struct.pack(f"<{len(prompt)}I", *prompt)
    keep = _common(packed, previous)
    logprobs = [t["logprob"] for t in ((choice.get("logprobs") or {}).get("content") or ())]
    return TokenTrace(
        prompt_keep=keep,
        prompt_ids=packed[4 * keep :],
        ids=struct.pack(f"<{len(ids)}I", *ids),
        logprobs=struct.pack(f"<{len(logprobs)}f", *logprobs),
        tokenizer=body.get("tokenizer") or "",
    )


def _common(a: bytes, b: bytes) -> int:
    """How many leading 4-byte words two arrays share."""
    if a[: len(b)] == b:
        return len(b) // 4
    return next(i for i in range(len(b) // 4 + 1) if a[4 * i : 4 * i + 4] != b[4 * i : 4 * i + 4])


async def _streamed(
    client: AsyncOpenAI, request: dict[str, Any], on_reasoning: Callable[[str], Awaitable[None]] | None
) -> dict[str, Any]:
    """The chunks of a streamed answer, put together in the shape of an unstreamed one."""
    out: dict[str, Any] = {}
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    choice: dict[str, Any] = {"message": message, "token_ids": None, "logprobs": {"content": []}}
    sent = 0
    stream = await client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **request
    )
    async for chunk in stream:
        data = chunk.model_dump()
        out.update({k: v for k, v in data.items() if k != "choices" and v is not None})
        for c in data.get("choices") or ():
            delta = c.get("delta") or {}
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls") or ():
                _merge_call(message["tool_calls"], part)
            if c.get("token_ids"):
                choice["token_ids"] = (choice["token_ids"] or []) + c["token_ids"]
            choice["logprobs"]["content"] += (c.get("logprobs") or {}).get("content") or []
            choice["finish_reason"] = c.get("finish_reason") or choice.get("finish_reason")
            if c.get("prompt_token_ids"):
                out["prompt_token_ids"] = c["prompt_token_ids"]
        if on_reasoning is not None:
            while len(message["reasoning_content"]) - sent >= REASONING_CHUNK:
                await on_reasoning(message["reasoning_content"][sent : sent + REASONING_CHUNK])
                sent += REASONING_CHUNK
    if on_reasoning is not None and len(message["reasoning_content"]) > sent:
        await on_reasoning(message["reasoning_content"][sent:])
    out["choices"] = [choice]
    return out


def _merge_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    index = part.get("index") or 0
    while len(calls) <= index:
        calls.append({"id": "", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    call["id"] = part.get("id") or call["id"]
    function = part.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""
