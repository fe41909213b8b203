"""The policy server: the sampler behind an OpenAI-compatible HTTP endpoint.

`/v1/chat/completions` (whole and streamed, with tools), `/v1/completions`, `/v1/models`, `/healthz`, `/readyz` and
`/metrics`. The openai SDK works as it is; the headers `X-Nexactor-Call-Id` and `X-Nexactor-Previous-Call-Id` add
answers that are kept and prompts that are exact to the token (generations.py). New weights are swapped in while it
serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from nexactor.events.errors import NexactorError
from nexactor.events.log import EventLog
from nexactor.events.types import PolicyPublished
from nexactor.learner import published
from nexactor.learner.answers import Answer, AnswerJournal
from nexactor.learner.chat import (
    Ask,
    RequestError,
    Shape,
    error_body,
    parse_chat,
    parse_completion,
    stable,
)
from nexactor.learner.generations import Generation, Generations
from nexactor.learner.sampler import Sampler
from nexactor.learner.sampling import PromptTooLong, QueueFull, SamplerClosed
from nexactor.learner.weights import Policy, load_policy

logger = logging.getLogger(__name__)

CALL_ID, PREVIOUS = "X-Nexactor-Call-Id", "X-Nexactor-Previous-Call-Id"
_MAX_BODY = 32 << 20
"""Bytes of a request."""


class PolicyServer:
    """A policy behind HTTP. `start` returns when it answers; `stop` lets what is in flight finish first.

    `data` is the server's own folder: kept answers, compiled programs. With `log`, the newest policy published there
    is served, from the start and as new ones come; `policy_path` is then what there is before the first.
    `version` names the weights at `policy_path` (default: the policy's name). `grace`: seconds that answers in
    flight have at a stop. `port` 0 takes a free one; `url` says which. `warm`: compile what most requests need
    while there is nothing else to do, instead of when it is needed first.
    """

    def __init__(
        self,
        policy_path: Path,
        *,
        data: Path,
        host: str = "127.0.0.1",
        port: int = 8000,
        log: EventLog | None = None,
        version: str = "",
        slots: int = 16,
        max_len: int = 2048,
        queue: int = 256,
        grace: float = 10.0,
        warm: bool = True,
        max_answers: int = 100_000,
        max_bytes: int = 256 << 20,
    ) -> None:
        self.host, self.port = host, port
        self._path, self._data, self._log, self._version = Path(policy_path), Path(data), log, version
        self._slots, self._max_len, self._queue = slots, max_len, queue
        self._grace, self._warm = grace, warm
        self._limits = {"max_answers": max_answers, "max_bytes": max_bytes}
        self._stopping = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._failed_swaps = 0
        self._policy: Policy
        self._sampler: Sampler
        self._generations: Generations | None = None
        self._started = time.time()

    @property
    def url(self) -> str:
        """What goes into OPENAI_BASE_URL."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def version(self) -> str:
        """The policy version that new requests are answered by."""
        return self._sampler.stats().version

    async def start(self) -> None:
        """Take the port, load the policy, serve. Raises NexactorError if any of it cannot be."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run(started), name="policy-server")
        try:
            await asyncio.wait([started, self._main], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._main.cancel()
            await asyncio.wait([self._main])
            raise
        if self._main.done():
            self._main.result()

    async def stop(self) -> None:
        """Refuse new requests, let those in flight finish for `grace` seconds, then let go of everything."""
        self._stopping.set()
        if self._main is not None:
            await self._main

    async def serve_forever(self) -> None:
        """Wait until the server is stopped."""
        if self._main is not None:
            await asyncio.shield(self._main)

    async def swap(self, path: Path, version: str) -> None:
        """Load the weights at `path` while serving, then answer new requests with them.

        Raises NexactorError if they are not of the same shape and tokenizer: the server goes on as it was.
        """
        async with self._loading:
            policy = await asyncio.to_thread(load_policy, Path(path))
            if policy.config != self._policy.config or policy.tokenizer.name != self._policy.tokenizer.name:
                raise NexactorError(
                    f"the policy at {path} has another shape or tokenizer than the one served "
                    f"({self._policy.name}): start another server for it"
                )
            self._sampler.swap(policy.params, version)
            logger.info("serving policy %s from %s", version, path)

    async def follow(self, log: EventLog) -> None:
        """Serve each newest policy that `log` says was published, for ever (see published.follow)."""

        async def serve_published(event: PolicyPublished) -> None:
            if event.version == self.version:
                return
            try:
                await self.swap(Path(event.path), event.version)
            except BaseException:
                self._failed_swaps += 1
                raise

        await published.follow(log, serve_published)

    # ---- life ---------------------------------------------------------------------------------------

    async def _run(self, started: asyncio.Future[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await self._open(stack)
            async with asyncio.TaskGroup() as tasks:
                self._generations = Generations(self._sampler, self._policy.tokenizer, self._journal, tasks)
                following = [tasks.create_task(self.follow(self._log))] if self._log is not None else []
                logger.info("policy %s is served at %s", self.version, self.url)
                started.set_result(None)
                await self._stopping.wait()
                await self._site.stop()
                if running := self._generations.running:
                    await asyncio.wait(running, timeout=self._grace)
                for task in (*self._generations.running, *following):
                    task.cancel()

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Everything that may fail; what was opened is closed by `stack`, the last first."""
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[self._errors])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._complete),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._models),
                web.get("/healthz", self._health),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._metrics),
            ]
        )
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        self._site = web.TCPSite(runner, self.host, self.port)
        try:
            await self._site.start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise NexactorError(
                    f"port {self.port} on {self.host} is taken: stop what listens there, or choose another with --port"
                ) from error
            raise NexactorError(
                f"cannot listen on {self.host}:{self.port}: {error.strerror or error}"
            ) from error
        self.port = runner.addresses[0][1]
        self._journal = await asyncio.to_thread(AnswerJournal, self._data / "answers", **self._limits)
        stack.callback(self._journal.close)
        newest = await published.newest(self._log) if self._log is not None else None
        path = Path(newest.path) if newest is not None else self._path
        self._policy = await asyncio.to_thread(load_policy, path)
        version = newest.version if newest is not None else self._version or self._policy.name
        self._sampler = await asyncio.to_thread(self._make_sampler, version)
        stack.push_async_callback(asyncio.to_thread, self._sampler.stop)
        self._sampler.start()

    def _make_sampler(self, version: str) -> Sampler:
        keep_compiled(self._data / "compiled")
        policy = self._policy
        sampler = Sampler(
            policy.params,
            policy.config,
            text=policy.tokenizer.decode,
            eos_ids=policy.tokenizer.eos_ids,
            version=version,
            slots=self._slots,
            max_len=self._max_len,
            queue=self._queue,
        )
        if self._warm:
            sampler.warm_when_idle()
        return sampler

    # ---- requests -----------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call_id = request.headers.get(CALL_ID, "")
        ask = parse_chat(
            await request.read(),
            call_id=call_id or f"chatcmpl-{uuid.uuid4().hex}",
            named=bool(call_id),
            previous=request.headers.get(PREVIOUS, ""),
        )
        return await self._respond(request, ask)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        call_id = request.headers.get(CALL_ID, "")
        ask = parse_completion(
            await request.read(), call_id=call_id or f"cmpl-{uuid.uuid4().hex}", named=bool(call_id)
        )
        return await self._respond(request, ask)

    async def _respond(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        if self._generations is None or self._stopping.is_set():
            raise RequestError("the policy server is starting or stopping: try again", status=503)
        found, reattached = self._generations.get(ask)
        decode = self._policy.tokenizer.decode
        shape = Shape(ask, ask.model or self._policy.name, int(time.time()), lambda i: decode([i]))
        if not ask.stream:
            answer = await found.answer() if isinstance(found, Generation) else found
            return _json(shape.whole(answer, reattached=reattached))
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        try:
            await self._stream(response, shape, ask, found, reattached)
        except (asyncio.CancelledError, ConnectionError):
            if isinstance(found, Generation):
                found.abandon()
            raise
        except Exception as error:
            # The status line is gone already: the error travels in the stream, where the SDK looks for it.
            await _send(response, error_body(_known(error)))
        else:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _stream(
        self,
        response: web.StreamResponse,
        shape: Shape,
        ask: Ask,
        found: Answer | Generation,
        reattached: bool,
    ) -> None:
        assert self._generations is not None
        await _send(response, shape.first(found.prompt_ids))
        told, seen = "", 0
        if isinstance(found, Generation):
            while not found.done.done():
                await found.grown(seen)
                ids, logprobs = found.ids[seen:], found.logprobs[seen:]
                seen += len(ids)
                text = self._generations.text(found.ids[:seen])
                shown = stable(text, stop=ask.stop, parse_tools=ask.parse_tools)
                await _send(response, shape.more(shown[len(told) :], ids, logprobs))
                told = max(told, shown, key=len)
            found = await found.answer()
        whole = found.message.content if found.message is not None else found.text
        await _send(response, shape.more(whole[len(told) :], found.ids[seen:], found.logprobs[seen:]))
        for chunk in shape.last(found, reattached=reattached):
            await _send(response, chunk)

    async def _models(self, request: web.Request) -> web.Response:
        if self._generations is None:
            raise RequestError("the policy is being loaded: try again", status=503)
        model = {
            "id": self._policy.name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "nexactor",
            "policy_version": self.version,
            "max_model_len": self._sampler.max_len,
            "tokenizer": self._policy.tokenizer.name,
        }
        if "model" in request.match_info:
            return _json({**model, "id": request.match_info["model"]})
        return _json({"object": "list", "data": [model]})

    async def _health(self, request: web.Request) -> web.Response:
        failure = self._sampler.failure if self._generations is not None else None
        status = "ok" if failure is None else f"the sampler failed: {failure!r}"
        return _json({"status": status}, 200 if failure is None else 503)

    async def _ready(self, request: web.Request) -> web.Response:
        ready = (
            self._generations is not None and not self._stopping.is_set() and self._sampler.failure is None
        )
        return _json({"ready": ready}, 200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [f'nexactor_policy_http_requests_total{{path="{p}",status="{s}"}} {n}'
                 for (p, s), n in sorted(self._counts.items())]  # fmt: skip
        if self._generations is not None:
            stats = self._sampler.stats()
            gauges = {"waiting", "active", "slots"}
            for name in stats.__struct_fields__:
                if name != "version":
                    suffix = "" if name in gauges else "_total"
                    lines.append(f"nexactor_policy_{name}{suffix} {getattr(stats, name)}")
            lines += [
                f"nexactor_policy_calls_{n}_total {c}" for n, c in sorted(self._generations.counts.items())
            ]
            lines.append(f"nexactor_policy_answers_kept {len(self._journal)}")
            lines.append(f"nexactor_policy_failed_swaps_total {self._failed_swaps}")
            lines.append(f'nexactor_policy_version{{version="{_label(stats.version)}"}} 1')
        return web.Response(text="\n".join(lines) + "\n", content_type="text/plain")

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Errors as OpenAI writes them, and counts."""
        status = 500
        try:
            response = await handler(request)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = 499
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            error = RequestError("the policy server is stopping: try again", status=503)
            return _json(error_body(error), 503)
        except web.HTTPException as error:
            status = error.status
            return _json(error_body(RequestError(error.reason, status=status)), status)
        except Exception as error:
            known = _known(error)
            status = known.status
            headers = {"Retry-After": "1"} if status in (429, 503) else {}
            return _json(error_body(known), status, headers)
        finally:
            resource = request.match_info.route.resource
            self._counts[resource.canonical if resource is not None else "other", status] += 1


async def serve(
    policy_path: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    data: Path,
    log: EventLog | None = None,
    slots: int = 16,
    max_len: int = 2048,
    on_ready: Callable[[PolicyServer], None] | None = None,
) -> None:
    """Serve a policy until cancelled; see PolicyServer. `on_ready` is called once it answers."""
    server = PolicyServer(policy_path, data=data, host=host, port=port, log=log, slots=slots, max_len=max_len)
    await server.start()
    try:
        if on_ready is not None:
            on_ready(server)
        await server.serve_forever()
    finally:
        await server.stop()


def keep_compiled(folder: Path) -> None:
    """Let JAX keep compiled programs in `folder` (unless it was told another one): a restart is ready in seconds."""
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        config.update("jax_compilation_cache_dir", str(folder))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _known(error: Exception) -> RequestError:
    """Any error as one that has a status."""
    match error:
        case RequestError():
            return error
        case PromptTooLong():
            return RequestError(str(error), code="context_length_exceeded", param="messages")
        case QueueFull():
            return RequestError(str(error), status=429, code="queue_full")
        case SamplerClosed():
            return RequestError(str(error), status=503)
        case NexactorError():
            return RequestError(str(error))
    logger.exception("a request failed", exc_info=error)
    return RequestError(f"the policy server failed: {error!r}", status=500)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


async def _send(response: web.StreamResponse, chunk: dict[str, object] | None) -> None:
    if chunk is not None:
        await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
