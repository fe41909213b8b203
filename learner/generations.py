"""Calls between the wire and the sampler: one generation a call id, its prompt exact to the token.

A call id that was answered gives the kept answer, also after a restart; one in flight is joined. The next turn of a
conversation (`previous` names its last call) goes on from the ids that were seen and sampled then; only the text
that is new is tokenised.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter

from nexactor.events.ids import digest
from nexactor.learner.answers import Answer, AnswerJournal
from nexactor.learner.chat import Ask, RequestError, answer_message
from nexactor.learner.sampler import Sampler
from nexactor.learner.sampling import Sample, SampleRequest, Ticket
from nexactor.learner.tokenizer import PolicyTokenizer, TemplateError


class Generation:
    """A generation in flight: the tokens so far, and in the end its answer, which is then on disk."""

    def __init__(self, ask: Ask, prompt_ids: list[int]) -> None:
        self.ask, self.prompt_ids = ask, prompt_ids
        self.request = ask.request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self._grown = asyncio.Event()
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        # Nobody may be left to hear of a failure: that is not an error of its own.
        self.done.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.task: asyncio.Task[None] | None = None

    def add(self, token: int, logprob: float) -> None:
        """A token was sampled."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.wake()

    def wake(self) -> None:
        """Let everyone in `grown` look again."""
        self._grown.set()
        self._grown = asyncio.Event()

    async def grown(self, seen: int) -> None:
        """Wait until there are more than `seen` tokens, or until it is over."""
        while len(self.ids) <= seen and not self.done.done():
            await self._grown.wait()

    async def answer(self) -> Answer:
        """The answer. A caller that goes away takes an anonymous generation with it; a named one goes on,
        since its caller may come back for it."""
        try:
            return await asyncio.shield(self.done)
        except asyncio.CancelledError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """The caller went away."""
        if not self.ask.named and self.task is not None:
            self.task.cancel()


class Generations:
    """Begins generations, keeps their answers, finds them again."""

    def __init__(
        self, sampler: Sampler, tokenizer: PolicyTokenizer, journal: AnswerJournal, tasks: asyncio.TaskGroup
    ) -> None:
        self._sampler, self._tokenizer, self._journal, self._tasks = sampler, tokenizer, journal, tasks
        self._running: dict[str, Generation] = {}
        self._end_of_turn = tokenizer.token_id(tokenizer.end_of_turn)
        self.counts: Counter[str] = Counter()

    @property
    def running(self) -> list[asyncio.Task[None]]:
        """The tasks of all generations in flight."""
        return [g.task for g in self._running.values() if g.task is not None]

    def get(self, ask: Ask) -> tuple[Answer | Generation, bool]:
        """The kept answer, or the generation in flight or begun now; and whether it was there before.

        Raises RequestError if the call id was used for something else, and what `Sampler.submit` raises.
        """
        found = self._journal.get(ask.call_id) or self._running.get(ask.call_id)
        if found is not None:
            if found.request != ask.request:
                raise RequestError(
                    f"call id {ask.call_id} was used for another request: an id stands for one request",
                    status=409,
                    code="call_id_reused",
                )
            self.counts["reattached"] += 1
            return found, True
        return self._begin(ask), False

    def _begin(self, ask: Ask) -> Generation:
        prompt_ids = self._prompt(ask)
        generation = Generation(ask, prompt_ids)
        loop = asyncio.get_running_loop()

        def on_token(token: int, logprob: float) -> None:
            loop.call_soon_threadsafe(generation.add, token, logprob)

        room = max(1, self._sampler.max_len - len(prompt_ids))
        request = SampleRequest(
            prompt=prompt_ids,
            max_tokens=room if ask.max_tokens is None else ask.max_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=_seed(ask.call_id) if ask.seed is None else ask.seed,
            stop=ask.stop,
        )
        ticket = self._sampler.submit(request, on_token)
        self._running[ask.call_id] = generation
        generation.task = self._tasks.create_task(self._run(generation, ticket))
        return generation

    async def _run(self, generation: Generation, ticket: Ticket) -> None:
        try:
            sample = await asyncio.wrap_future(ticket.future)
            answer = self._answer(generation, sample)
            await self._journal.keep(answer)
        except asyncio.CancelledError:
            generation.done.cancel()
            raise
        except Exception as error:
            generation.done.set_exception(error)
        else:
            generation.done.set_result(answer)
        finally:
            del self._running[generation.ask.call_id]
            generation.wake()

    def _answer(self, generation: Generation, sample: Sample) -> Answer:
        ask = generation.ask
        text = self.text(sample.ids)
        if sample.stopped_by:
            text = text[: text.find(sample.stopped_by)]
        message, finish, context = None, sample.finish_reason, ""
        if ask.prompt is None:
            message = answer_message(text, parse_tools=ask.parse_tools, call_id=ask.call_id)
            finish = "tool_calls" if message.tool_calls else finish
            context = digest([*ask.messages, message])
        return Answer(
            call_id=ask.call_id,
            request=generation.request,
            prompt_ids=generation.prompt_ids,
            ids=sample.ids,
            logprobs=sample.logprobs,
            text=text,
            finish_reason=finish,
            policy_version=sample.version,
            time=time.time_ns(),
            message=message,
            context=context,
            context_messages=len(ask.messages) + 1 if message is not None else 0,
            tools=ask.tools_digest,
            tokenizer=self._tokenizer.name,
            cached_tokens=sample.cached_tokens,
        )

    def text(self, ids: list[int]) -> str:
        """The text of sampled ids, without the end token; other special tokens stay visible."""
        ended = bool(ids) and ids[-1] in self._tokenizer.eos_ids
        return self._tokenizer.decode(ids[:-1] if ended else ids)

    def _prompt(self, ask: Ask) -> list[int]:
        if ask.prompt is not None:
            return self._tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else list(ask.prompt)
        exact = self._continued(ask)
        if exact is not None:
            self.counts["continued"] += 1
            return exact
        self.counts["rendered"] += 1
        return self._tokenizer.encode(self._tokenizer.render(ask.messages, ask.tools, generation=True))

    def _continued(self, ask: Ask) -> list[int] | None:
        """The prompt as a continuation of the previous call's ids, or None where that call is not kept, is not
        the beginning of this one, or the template rewrites the past."""
        last = self._journal.get(ask.previous) if ask.previous else None
        if last is None or last.message is None or last.tokenizer != self._tokenizer.name:
            return None
        before, new = ask.messages[: last.context_messages], ask.messages[last.context_messages :]
        if not new or last.tools != ask.tools_digest or digest(before) != last.context:
            return None
        ended = last.ids[-1] == self._end_of_turn
        try:
            text = self._tokenizer.continuation(before, new, ask.tools, ended=ended)
        except TemplateError:
            return None
        return [*last.prompt_ids, *last.ids, *self._tokenizer.encode(text)]


def _seed(call_id: str) -> int:
    """A call without a seed gets its own, from its id: asked again after a crash it gives the same sample."""
    return int.from_bytes(hashlib.sha256(call_id.encode()).digest()[:8], "little")
