"""The model client: exact tokens as differences, streamed answers put together, errors that say what to do."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import web

from nexactor.agent.model import REASONING_CHUNK, ModelClient, ModelError
from nexactor.events.messages import Message, ToolSpec
from nexactor.spec import LLMConfig

ADD = ToolSpec("add", "Add.", {"type": "object", "properties": {}})


def ids(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


class Endpoint:
    """Answers with whatever a test puts into `reply`: a JSON body, chunks of a stream, or an error status."""

    def __init__(self) -> None:
        self.reply: dict[str, Any] | list[dict[str, Any]] = {}
        self.status = 200
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        headers = {k.lower(): v for k, v in request.headers.items()}
        self.seen.append((headers, await request.json()))
        if isinstance(self.reply, dict):
            return web.json_response(self.reply, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in self.reply:
            await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", endpoint.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield endpoint
    await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[ModelClient]:
    client = ModelClient()
    yield client
    await client.close()


def _config(endpoint: Endpoint, **options: Any) -> LLMConfig:
    return LLMConfig("m", base_url=endpoint.url, api_key="k", max_retries=1, **options)


def _answer(**extra: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice | extra]}


async def _call(client: ModelClient, config: LLMConfig, **options: Any) -> Any:
    return await client.call(config, [Message("user", "q")], [ADD], call_id="c1", **options)


@pytest.mark.parametrize(
    ("previous", "prompt", "keep"),
    [((), (1, 2, 3), 0), ((1, 2), (1, 2, 3), 2), ((1, 9), (1, 2, 3), 1), ((1, 2, 3, 4), (1, 2), 2)],
)
async def test_prompt_ids_are_stored_from_where_they_differ(
    endpoint: Endpoint,
    client: ModelClient,
    previous: tuple[int, ...],
    prompt: tuple[int, ...],
    keep: int,
) -> None:
    logprobs = {"content": [{"token": "h", "logprob": -0.5}]}
    endpoint.reply = _answer(token_ids=[7], logprobs=logprobs) | {"prompt_token_ids": list(prompt)}
    answer = await _call(client, _config(endpoint, token_ids=True), previous_tokens=ids(*previous))
    assert answer.tokens.prompt_keep == keep
    assert answer.tokens.prompt_ids == ids(*prompt[keep:])
    assert (answer.tokens.ids, answer.tokens.logprobs) == (ids(7), struct.pack("<f", -0.5))
    assert endpoint.seen[0][1]["return_token_ids"] is True


async def test_an_endpoint_that_is_not_asked_for_ids_sees_a_plain_request(
    endpoint: Endpoint, client: ModelClient
) -> None:
    endpoint.reply = _answer()
    answer = await _call(client, _config(endpoint, temperature=0.5), previous_call_id="c0")
    headers, body = endpoint.seen[0]
    assert answer.tokens is None
    assert set(body) == {"model", "messages", "tools", "temperature"}
    assert (headers["x-nexactor-call-id"], headers["x-nexactor-previous-call-id"]) == ("c1", "c0")


async def test_a_streamed_answer_is_put_together_and_its_reasoning_comes_in_bounded_chunks(
    endpoint: Endpoint, client: ModelClient
) -> None:
    def chunk(delta: dict[str, Any], **extra: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": None} | extra
        return {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}

    def part(**function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "id": "t" if "name" in function else None, "function": function}]}

    endpoint.reply = [
        chunk({"reasoning_content": "a" * REASONING_CHUNK}),
        chunk({"reasoning_content": "bb"}),
        chunk({"content": "he"}, token_ids=[1]),
        chunk({"content": "llo"}, token_ids=[2]),
        chunk(part(name="add", arguments='{"a"')),
        chunk(part(arguments=":1}")),
        chunk({}, finish_reason="tool_calls"),
    ]
    heard: list[str] = []

    async def on_reasoning(text: str) -> None:
        heard.append(text)

    answer = await _call(client, _config(endpoint, stream=True), on_reasoning=on_reasoning)
    assert heard == ["a" * REASONING_CHUNK, "bb"]
    assert (answer.message.content, answer.finish_reason) == ("hello", "tool_calls")
    assert [(c.id, c.name, c.arguments) for c in answer.message.tool_calls] == [("t", "add", '{"a":1}')]


async def test_a_400_is_not_repeated_and_a_context_overflow_is_the_policys_own_doing(
    endpoint: Endpoint, client: ModelClient
) -> None:
    endpoint.status = 400
    for code, infra in (("context_length_exceeded", False), ("other", True)):
        endpoint.seen.clear()
        endpoint.reply = {"error": {"message": "no", "code": code}}
        with pytest.raises(ModelError, match="refused the call to m") as error:
            await _call(client, _config(endpoint))
        assert error.value.infra is infra
        assert len(endpoint.seen) == 1


async def test_an_answer_of_another_shape_and_an_unset_key_are_clear_errors(
    endpoint: Endpoint, client: ModelClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.reply = {"what": 1}
    with pytest.raises(ModelError, match="another shape"):
        await _call(client, _config(endpoint))
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ModelError, match="NO_KEY is not set"):
        await _call(client, LLMConfig("m", base_url=endpoint.url, api_key="${env.NO_KEY}"))
