"""The policy server over real HTTP, asked by the openai SDK as anyone would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from nexactor.events.errors import NexactorError
from nexactor.events.memory import MemoryLog
from nexactor.events.types import PolicyPublished
from nexactor.learner.answers import count_generations, read_answers
from nexactor.learner.generations import Generations
from nexactor.learner.server import PolicyServer, serve
from nexactor.learner.tiny import make_tiny_policy
from nexactor.learner.weights import folder_digest

ASK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Count the lines of notes.txt."},
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "read_file",
            "description": "Read a file.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
            },
        },
    }
]
IDS = {"return_token_ids": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "tiny-0"
    make_tiny_policy(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "tiny-1"
    make_tiny_policy(folder, seed=1)
    return folder


def make(folder: Path, data: Path, **options: Any) -> PolicyServer:
    defaults: dict[str, Any] = {"port": 0, "slots": 4, "max_len": 256, "warm": False}
    return PolicyServer(folder, data=data, **(defaults | options))


@pytest.fixture
async def server(folder: Path, tmp_path: Path) -> AsyncIterator[PolicyServer]:
    server = make(folder, tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: PolicyServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def call(call_id: str, previous: str = "") -> dict[str, str]:
    return {"X-Nexactor-Call-Id": call_id} | ({"X-Nexactor-Previous-Call-Id": previous} if previous else {})


async def ask(client: openai.AsyncOpenAI, call_id: str = "", **options: Any) -> Any:
    defaults: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 8, "seed": 1}
    headers = call(call_id, options.pop("previous", "")) if call_id else {}
    return await client.chat.completions.create(extra_headers=headers, **(defaults | options))


async def text_of(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


def root(server: PolicyServer) -> str:
    return server.url.removesuffix("/v1")


# ---- plain answers --------------------------------------------------------------------------------------


async def test_an_answer_carries_ids_log_probs_version_and_usage(
    client: openai.AsyncOpenAI, server: PolicyServer, folder: Path
) -> None:
    from nexactor.learner.weights import load_policy

    got = await ask(client, logprobs=True, extra_body=IDS)
    tokenizer = load_policy(folder).tokenizer
    choice = got.choices[0]
    assert tokenizer.decode(got.prompt_token_ids).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
    )
    assert tokenizer.decode(got.prompt_token_ids).endswith("<|im_start|>assistant\n")
    assert got.policy_version == server.version == "tiny-0"
    assert len(choice.token_ids) == got.usage.completion_tokens == len(choice.logprobs.content)
    assert got.usage.prompt_tokens == len(got.prompt_token_ids)
    assert all(p.logprob <= 0 for p in choice.logprobs.content)
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")


async def test_token_ids_and_log_probs_come_only_when_asked_for(client: openai.AsyncOpenAI) -> None:
    got = await ask(client)
    assert not hasattr(got, "prompt_token_ids")
    assert not hasattr(got.choices[0], "token_ids")
    assert got.choices[0].logprobs is None


async def test_a_seed_repeats_an_answer(client: openai.AsyncOpenAI) -> None:
    first, again, different = [(await ask(client, seed=s)).choices[0].message.content for s in (5, 5, 6)]
    assert first == again != different


async def test_a_stop_string_is_not_part_of_the_answer(client: openai.AsyncOpenAI) -> None:
    whole = (await ask(client, seed=3, max_tokens=30)).choices[0].message.content
    stop = whole[10:13]
    cut = await ask(client, seed=3, max_tokens=30, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


async def test_plain_completions_take_text_or_ids(client: openai.AsyncOpenAI) -> None:
    by_text = await client.completions.create(
        model="tiny", prompt="The file", max_tokens=6, seed=2, logprobs=1, extra_body=IDS
    )
    ids: Any = by_text.prompt_token_ids  # type: ignore[attr-defined]
    by_ids = await client.completions.create(model="tiny", prompt=ids, max_tokens=6, seed=2)
    assert by_text.choices[0].text == by_ids.choices[0].text
    logprobs = by_text.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == by_text.usage.completion_tokens  # type: ignore[union-attr]


async def test_models_are_listed_with_their_version(client: openai.AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert (model.id, model.owned_by, model.policy_version) == ("tiny-0", "nexactor", "tiny-0")  # type: ignore[attr-defined]


async def test_many_at_once_are_all_answered(client: openai.AsyncOpenAI) -> None:
    together = await asyncio.gather(*(ask(client, seed=i) for i in range(12)))
    alone = await ask(client, seed=11)
    assert together[11].choices[0].message.content == alone.choices[0].message.content
    assert together[11].usage.prompt_tokens_details.cached_tokens > 0


# ---- streams --------------------------------------------------------------------------------------------


async def stream(client: openai.AsyncOpenAI, call_id: str = "", **options: Any) -> list[Any]:
    chunks = await ask(client, call_id, stream=True, stream_options={"include_usage": True}, **options)
    return [c async for c in chunks]


async def test_a_stream_adds_up_to_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    whole = await ask(client, max_tokens=40, logprobs=True, extra_body=IDS)
    chunks = await stream(client, max_tokens=40, logprobs=True, extra_body=IDS)
    choices = [c.choices[0] for c in chunks if c.choices]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [i for c in choices for i in getattr(c, "token_ids", [])] == whole.choices[0].token_ids
    logprobs = [p.logprob for c in choices if c.logprobs for p in c.logprobs.content]
    assert logprobs == pytest.approx([p.logprob for p in whole.choices[0].logprobs.content], abs=1e-4)
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_a_stream_holds_back_what_may_become_a_stop_string(client: openai.AsyncOpenAI) -> None:
    text = (await ask(client, seed=3, max_tokens=30)).choices[0].message.content
    stop = text[10:16]
    chunks = await stream(client, seed=3, max_tokens=30, stop=[stop])
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text[: text.find(stop)]


async def test_the_sdks_stream_helper_understands_it(client: openai.AsyncOpenAI) -> None:
    text = (await ask(client, max_tokens=30)).choices[0].message.content
    stop = text[12:15]
    helper: Any = client.chat.completions.stream
    async with helper(model="tiny", messages=ASK, max_tokens=30, seed=1, stop=stop) as events:
        final = await events.get_final_completion()
    assert final.choices[0].message.content == text[: text.find(stop)]


# ---- tool calls -----------------------------------------------------------------------------------------

SAID = 'I look.\n<tool_call>{"name": "read_file", "arguments": {"path": "notes.txt"}}</tool_call>'


@pytest.fixture
def calling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a random policy samples reads as a tool call, nine characters a token."""
    monkeypatch.setattr(Generations, "text", lambda self, ids: SAID[: 9 * len(ids)])


@pytest.mark.usefixtures("calling")
async def test_a_tool_call_is_native_and_its_id_is_the_calls(client: openai.AsyncOpenAI) -> None:
    got = await ask(client, "t@1", tools=TOOLS, max_tokens=12)
    message = got.choices[0].message
    assert got.choices[0].finish_reason == "tool_calls"
    assert message.content == "I look."
    [tool_call] = message.tool_calls
    assert (tool_call.id, tool_call.function.name) == ("t@1-0", "read_file")
    assert json.loads(tool_call.function.arguments) == {"path": "notes.txt"}


@pytest.mark.usefixtures("calling")
async def test_a_streamed_tool_call_never_shows_in_the_text(client: openai.AsyncOpenAI) -> None:
    chunks = await stream(client, "t@1", tools=TOOLS, max_tokens=12)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == "I look."
    [tool_call] = [t for d in deltas for t in d.tool_calls or ()]
    assert (tool_call.id, tool_call.index, tool_call.function.name) == ("t@1-0", 0, "read_file")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"


@pytest.mark.usefixtures("calling")
async def test_a_tools_result_continues_the_ids_of_the_call(client: openai.AsyncOpenAI) -> None:
    first = await ask(client, "t@1", tools=TOOLS, max_tokens=12, extra_body=IDS)
    message = first.choices[0].message.model_dump(exclude_none=True, exclude={"refusal"})
    result = {"role": "tool", "tool_call_id": "t@1-0", "content": "12 lines"}
    second = await ask(
        client, "t@2", previous="t@1", tools=TOOLS, messages=[*ASK, message, result], extra_body=IDS
    )
    before = [*first.prompt_token_ids, *first.choices[0].token_ids]
    assert second.prompt_token_ids[: len(before)] == before


# ---- errors ---------------------------------------------------------------------------------------------


async def test_a_prompt_beyond_the_context_is_refused_as_openai_does(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, messages=[{"role": "user", "content": "word " * 400}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_a_wrong_request_names_the_field(
    client: openai.AsyncOpenAI, wrong: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, **wrong)
    assert caught.value.param == param


async def test_unknown_paths_get_an_openai_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="tiny", input="x")


async def test_a_full_queue_asks_to_come_back(folder: Path, tmp_path: Path) -> None:
    server = make(folder, tmp_path, queue=1)
    await server.start()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        results = await asyncio.gather(
            *(ask(client, max_tokens=50) for _ in range(12)), return_exceptions=True
        )
    await server.stop()
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    assert refused
    assert refused[0].response.headers["Retry-After"] == "1"
    assert len(refused) < len(results)


async def test_a_taken_port_is_named(server: PolicyServer, folder: Path, tmp_path: Path) -> None:
    second = make(folder, tmp_path / "second", port=server.port)
    with pytest.raises(NexactorError, match=f"port {server.port} .* is taken"):
        await second.start()


async def test_two_servers_on_one_data_folder_are_refused(
    server: PolicyServer, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(NexactorError, match="in use by another policy server"):
        await make(folder, tmp_path).start()


async def test_a_policy_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NexactorError, match="no such file or folder"):
        await make(tmp_path / "nothing", tmp_path).start()


# ---- kept answers ---------------------------------------------------------------------------------------


async def test_the_same_call_id_gives_the_kept_answer(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    first = await ask(client, "agent/r1@3.0", seed=None, extra_body=IDS)
    again = await ask(client, "agent/r1@3.0", seed=None, extra_body=IDS)
    assert (first.reattached, again.reattached) == (False, True)
    assert first.id == again.id == "agent/r1@3.0"
    assert first.choices == again.choices
    assert count_generations(tmp_path / "answers") == {"agent/r1@3.0": 1}


async def test_a_call_in_flight_is_joined(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    both = await asyncio.gather(*(ask(client, "agent/r1@4.0", max_tokens=30) for _ in range(2)))
    assert sorted(a.reattached for a in both) == [False, True]
    assert both[0].choices == both[1].choices
    assert count_generations(tmp_path / "answers") == {"agent/r1@4.0": 1}


async def test_a_named_call_goes_on_when_its_caller_is_gone(
    client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    chunks = await ask(client, "agent/r1@5.0", stream=True, max_tokens=150)
    await anext(aiter(chunks))
    await chunks.close()
    again = await ask(client, "agent/r1@5.0", max_tokens=150)
    assert again.reattached
    assert count_generations(tmp_path / "answers") == {"agent/r1@5.0": 1}


async def test_an_anonymous_call_ends_when_its_caller_is_gone(
    client: openai.AsyncOpenAI, server: PolicyServer
) -> None:
    chunks = await ask(client, stream=True, max_tokens=200, stop=["never to be seen"])
    async for _ in chunks:
        break
    await chunks.close()
    while (stats := server._sampler.stats()).cancelled == 0 and stats.active + stats.waiting:
        await asyncio.sleep(0.01)
    assert server._sampler.stats().cancelled == 1


async def test_a_restarted_server_still_has_the_answer(folder: Path, tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        server = make(folder, tmp_path)
        await server.start()
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            answers.append(await ask(client, "agent/r1@6.0", seed=None, logprobs=True, extra_body=IDS))
        await server.stop()
    assert [a.reattached for a in answers] == [False, True]
    assert answers[0].choices == answers[1].choices
    assert answers[0].prompt_token_ids == answers[1].prompt_token_ids


async def test_a_kept_answer_can_be_streamed(client: openai.AsyncOpenAI) -> None:
    whole = await ask(client, "agent/r1@7.0", extra_body=IDS)
    chunks = await stream(client, "agent/r1@7.0", extra_body=IDS)
    choices = [c.choices[0] for c in chunks if c.choices]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert [i for c in choices for i in getattr(c, "token_ids", [])] == whole.choices[0].token_ids


async def test_a_call_id_stands_for_one_request(client: openai.AsyncOpenAI) -> None:
    await ask(client, "agent/r1@8.0")
    with pytest.raises(openai.ConflictError, match="another request"):
        await ask(client, "agent/r1@8.0", messages=[{"role": "user", "content": "Something else."}])


# ---- token-exact turns ----------------------------------------------------------------------------------


def next_turn(answer: Any, text: str = "Go on.", before: list[dict[str, Any]] = ASK) -> list[dict[str, Any]]:
    message = answer.choices[0].message.model_dump(exclude_none=True, exclude={"refusal"})
    return [*before, message, {"role": "user", "content": text}]


async def test_the_next_turns_prompt_starts_with_the_ids_that_were_sampled(
    client: openai.AsyncOpenAI, server: PolicyServer
) -> None:
    first = await ask(client, "a@1", seed=4, extra_body=IDS)
    second = await ask(client, "a@2", previous="a@1", messages=next_turn(first), extra_body=IDS)
    before = [*first.prompt_token_ids, *first.choices[0].token_ids]
    assert second.prompt_token_ids[: len(before)] == before
    assert second.usage.prompt_tokens_details.cached_tokens == len(before) - 1
    tail = server._policy.tokenizer.decode(second.prompt_token_ids[len(before) :])
    assert tail.endswith("\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")
    assert tail.startswith("<|im_end|>") == (first.choices[0].finish_reason == "length")


async def test_turns_stay_exact_across_a_restart(folder: Path, tmp_path: Path) -> None:
    server = make(folder, tmp_path)
    await server.start()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
        first = await ask(client, "a@1", seed=4, extra_body=IDS)
    await server.stop()
    server = make(folder, tmp_path)
    await server.start()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
        second = await ask(client, "a@2", previous="a@1", messages=next_turn(first), extra_body=IDS)
    await server.stop()
    before = [*first.prompt_token_ids, *first.choices[0].token_ids]
    assert second.prompt_token_ids[: len(before)] == before


async def test_a_rewritten_history_is_rendered_anew(client: openai.AsyncOpenAI, server: PolicyServer) -> None:
    first = await ask(client, "a@1", seed=4, extra_body=IDS)
    changed = next_turn(first)
    changed[0] = {"role": "system", "content": "You are terse."}
    second = await ask(client, "a@2", previous="a@1", messages=changed, extra_body=IDS)
    assert "You are terse." in server._policy.tokenizer.decode(second.prompt_token_ids)
    assert second.prompt_token_ids[: len(first.prompt_token_ids)] != first.prompt_token_ids


async def test_other_tools_are_rendered_anew(client: openai.AsyncOpenAI, server: PolicyServer) -> None:
    first = await ask(client, "a@1", seed=4)
    second = await ask(client, "a@2", previous="a@1", messages=next_turn(first), tools=TOOLS, extra_body=IDS)
    assert "read_file(path)" in server._policy.tokenizer.decode(second.prompt_token_ids)


# ---- weights --------------------------------------------------------------------------------------------


async def test_swapped_weights_answer_the_next_request(
    client: openai.AsyncOpenAI, server: PolicyServer, other: Path
) -> None:
    before = await ask(client)
    await server.swap(other, "step-1")
    after = await ask(client)
    assert (before.policy_version, after.policy_version) == ("tiny-0", "step-1")
    assert before.choices[0].message.content != after.choices[0].message.content
    assert (await client.models.list()).data[0].policy_version == "step-1"  # type: ignore[attr-defined]


async def test_weights_of_another_shape_are_refused_and_the_server_goes_on(
    client: openai.AsyncOpenAI, server: PolicyServer, tmp_path: Path
) -> None:
    with pytest.raises(NexactorError):
        await server.swap(tmp_path / "nothing", "step-9")
    assert (await ask(client)).policy_version == "tiny-0"


def publication(path: Path, version: str, digest: str = "") -> PolicyPublished:
    return PolicyPublished(version=version, path=str(path), digest=digest or folder_digest(path), step=1)


async def wait_for(server: PolicyServer, version: str) -> None:
    async with asyncio.timeout(30):
        while server.version != version:
            await asyncio.sleep(0.01)


async def test_what_the_log_publishes_is_served_also_after_a_restart(
    folder: Path, other: Path, tmp_path: Path
) -> None:
    log = MemoryLog()
    server = make(folder, tmp_path, log=log)
    await server.start()
    assert server.version == "tiny-0"
    await log.append("learner/l", [publication(other, "step-1")], expected_version=0)
    await wait_for(server, "step-1")
    # Neither a version that is gone nor one that was damaged is served.
    await log.append(
        "learner/l",
        [
            publication(other, "step-2", digest="0" * 64),
            publication(tmp_path / "gone", "step-3", digest="0" * 64),
        ],
        expected_version=1,
    )
    await log.append("learner/l", [publication(folder, "step-4")], expected_version=3)
    await wait_for(server, "step-4")
    await log.append("learner/l", [publication(other, "step-5", digest="1" * 64)], expected_version=4)
    await server.stop()
    server = make(other, tmp_path, log=log)
    await server.start()
    assert server.version == "step-4"
    await server.stop()


# ---- operation ------------------------------------------------------------------------------------------


async def test_health_readiness_and_metrics(client: openai.AsyncOpenAI, server: PolicyServer) -> None:
    got = await ask(client, "m@1")
    await ask(client, "m@1")
    assert json.loads(await text_of(f"{root(server)}/healthz")) == {"status": "ok"}
    assert json.loads(await text_of(f"{root(server)}/readyz")) == {"ready": True}
    lines = dict(line.rsplit(" ", 1) for line in (await text_of(f"{root(server)}/metrics")).splitlines())
    assert lines["nexactor_policy_requests_total"] == "1"
    assert lines["nexactor_policy_sampled_tokens_total"] == str(got.usage.completion_tokens)
    assert lines["nexactor_policy_calls_reattached_total"] == "1"
    assert lines['nexactor_policy_version{version="tiny-0"}'] == "1"
    assert lines['nexactor_policy_http_requests_total{path="/v1/chat/completions",status="200"}'] == "2"


async def test_a_stop_lets_what_is_in_flight_finish(folder: Path, tmp_path: Path) -> None:
    server = make(folder, tmp_path, grace=30.0)
    await server.start()
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        chunks = await ask(client, "s@1", stream=True, max_tokens=60)
        pieces = [await anext(aiter(chunks))]
        stopping = asyncio.create_task(server.stop())
        pieces += [c async for c in chunks]
        await stopping
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert [a.call_id for a in read_answers(tmp_path / "answers")] == ["s@1"]


async def test_serve_runs_until_it_is_cancelled(folder: Path, tmp_path: Path) -> None:
    ready: asyncio.Future[PolicyServer] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(folder, port=0, data=tmp_path, max_len=256, slots=4, on_ready=ready.set_result)
    )
    server = await ready
    assert json.loads(await text_of(f"{root(server)}/readyz")) == {"ready": True}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(aiohttp.ClientConnectionError):
        await text_of(f"{root(server)}/readyz")
