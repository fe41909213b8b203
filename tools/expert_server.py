"""An OpenAI-compatible endpoint that plays the scripted expert: demonstrations are recorded by ordinary agents.

`async with serve_expert() as url: ...`, or `python -m nexactor.tools.expert_server --port N` as a process of its own.
It keeps nothing: the answer is a function of the conversation, so a call repeated after a crash gets the same one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from nexactor.events.errors import ConfigError
from nexactor.events.messages import Message, Role, ToolCall, ToolSpec
from nexactor.tools.expert import ExpertError, expert_answer

MODEL = "expert"


class _Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class _Call(msgspec.Struct):
    function: _Function
    id: str = ""


class _Part(msgspec.Struct):
    type: str = "text"
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None

    def message(self) -> Message:
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        calls = tuple(ToolCall(c.id, c.function.name, c.function.arguments) for c in self.tool_calls or ())
        role: Role = msgspec.convert("system" if self.role == "developer" else self.role, Role)
        return Message(role, text, calls, self.tool_call_id or "")


class _ToolFunction(msgspec.Struct):
    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class _Tool(msgspec.Struct):
    function: _ToolFunction

    def spec(self) -> ToolSpec:
        return ToolSpec(self.function.name, self.function.description, self.function.parameters)


class _Request(msgspec.Struct):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    stream: bool = False


_decoder = msgspec.json.Decoder(_Request)


@asynccontextmanager
async def serve_expert(port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """Serve until the block ends; yields the base URL (`http://host:port/v1`). ConfigError if the port is taken."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", _completions)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/healthz", _health)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"the expert cannot listen on {host}:{port}: {error.strerror or error}. "
                "Choose another port, or 0 for any free one"
            ) from error
        yield f"http://{host}:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok", "model": MODEL})


async def _models(request: web.Request) -> web.Response:
    return web.json_response(
        {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "nexactor"}]}
    )


async def _completions(request: web.Request) -> web.StreamResponse:
    try:
        asked = _decoder.decode(await request.read())
        messages = [message.message() for message in asked.messages]
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        return _error(400, f"not a chat completion request: {error}")
    try:
        answer = expert_answer(messages, [tool.spec() for tool in asked.tools or ()])
    except ExpertError as error:
        return _error(422, str(error))
    call_id = request.headers.get("X-Nexactor-Call-Id") or f"expert-{uuid.uuid4().hex}"
    if asked.stream:
        return await _stream(request, call_id, answer)
    choice = {
        "index": 0,
        "message": {"role": "assistant", **_content(call_id, answer)},
        "finish_reason": _finish(answer),
        "logprobs": None,
    }
    return web.json_response(
        {**_head(call_id, "chat.completion"), "choices": [choice], "usage": _usage(messages, answer)}
    )


async def _stream(request: web.Request, call_id: str, answer: Message) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    delta: dict[str, Any] = {"role": "assistant", **_content(call_id, answer)}
    for index, call in enumerate(delta.get("tool_calls", ())):
        call["index"] = index
    for part, finish in ((delta, None), ({}, _finish(answer))):
        choice = {"index": 0, "delta": part, "finish_reason": finish}
        chunk = {**_head(call_id, "chat.completion.chunk"), "choices": [choice]}
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _head(call_id: str, kind: str) -> dict[str, Any]:
    return {"id": call_id, "object": kind, "created": 0, "model": MODEL}


def _finish(answer: Message) -> str:
    return "tool_calls" if answer.tool_calls else "stop"


def _content(call_id: str, answer: Message) -> dict[str, Any]:
    if not answer.tool_calls:
        return {"content": answer.content}
    calls = [
        {"id": f"{call_id}-{i}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for i, c in enumerate(answer.tool_calls)
    ]
    return {"content": answer.content or None, "tool_calls": calls}


def _usage(messages: list[Message], answer: Message) -> dict[str, int]:
    """Whitespace-separated words: the expert has no tokenizer, and clients want numbers."""
    read = sum(len(message.content.split()) for message in messages)
    written = len(answer.content.split()) + sum(len(call.arguments.split()) for call in answer.tool_calls)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _error(status: int, text: str) -> web.Response:
    return web.json_response(
        {"error": {"message": text, "type": "invalid_request_error", "code": status}}, status=status
    )


async def _serve(host: str, port: int) -> None:
    async with serve_expert(port, host) as url:
        print(json.dumps({"url": url, "model": MODEL}), flush=True)
        await asyncio.Event().wait()


def main() -> int:
    """Serve until interrupted; the first line printed is JSON with the URL. Exit code 2 if the port is taken."""
    parser = argparse.ArgumentParser(
        description="Serve the scripted expert as an OpenAI-compatible endpoint."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    options = parser.parse_args()
    try:
        asyncio.run(_serve(options.host, options.port))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
