"""Helpers for the tests of people who build on nexactor (and for our own): a scripted model behind a real endpoint."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

import msgspec

from nexactor.events.messages import Message, ToolCall
from nexactor.spec import LLMConfig

Script = Callable[[list[dict[str, Any]]], "Message | str | Awaitable[Message | str]"]


def call(name: str, **arguments: Any) -> Message:
    """An answer that calls one tool."""
    return calls((name, arguments))


def calls(*wanted: tuple[str, dict[str, Any]]) -> Message:
    """An answer that calls several tools at once; ids are filled in by the scripted model."""
    made = tuple(ToolCall("", name, msgspec.json.encode(a).decode()) for name, a in wanted)
    return Message("assistant", tool_calls=made)


class ScriptedModel:
    """An OpenAI-compatible endpoint on loopback whose answers a script gives.

    `script` is a list of answers, given one a call in order, or a function of the request's messages. Answers are
    kept by call id, as nexactor's policy server keeps them. `requests` holds every request body received.
    """

    def __init__(self, script: Sequence[Message | str] | Script, *, keep_answers: bool = True) -> None:
        self._script = script
        self._keep = keep_answers
        self._answers: dict[str, dict[str, Any]] = {}
        self._runner: Any = None
        self.requests: list[dict[str, Any]] = []
        self.generated: dict[str, int] = {}
        self.url = ""

    @property
    def llm(self) -> LLMConfig:
        """The configuration of an agent that talks to this model."""
        return LLMConfig(model="scripted", base_url=self.url, api_key="none")

    async def __aenter__(self) -> ScriptedModel:
        from aiohttp import web

        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _chat(self, request: Any) -> Any:
        from aiohttp import web

        body = await request.json()
        self.requests.append(body)
        call_id = request.headers.get("X-Nexactor-Call-Id", "")
        if self._keep and call_id in self._answers:
            return web.json_response({**self._answers[call_id], "reattached": True})
        answer: Any
        if callable(self._script):
            answer = self._script(body["messages"])
            if inspect.isawaitable(answer):
                answer = await answer
        elif len(self._script) > len(self.generated):
            answer = self._script[len(self.generated)]
        else:
            error = {"message": "the script has no more answers", "type": "invalid_request_error"}
            return web.json_response({"error": error}, status=400)
        name = call_id or f"call-{len(self.generated)}"
        self.generated[name] = self.generated.get(name, 0) + 1
        out = self._answers[call_id] = _completion(answer, name)
        return web.json_response(out)


def _completion(answer: Message | str, call_id: str) -> dict[str, Any]:
    message = Message("assistant", answer) if isinstance(answer, str) else answer
    said: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning:
        said["reasoning_content"] = message.reasoning
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": c.id or f"{call_id}-{i}",
                "type": "function",
                "function": {"name": c.name, "arguments": c.arguments},
            }
            for i, c in enumerate(message.tool_calls)
        ]
    return {
        "id": call_id,
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [
            {"index": 0, "message": said, "finish_reason": "tool_calls" if message.tool_calls else "stop"}
        ],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
