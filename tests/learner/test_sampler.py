"""The sampler: what it returns is what a full forward pass says, whoever its neighbours are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nexactor.events.errors import NexactorError
from nexactor.learner.model import Config, Params, causal_attend, forward, init, logits
from nexactor.learner.sampler import Sampler
from nexactor.learner.sampling import PromptTooLong, QueueFull, Sample, SamplerClosed, SampleRequest, Ticket

CONFIG = Config(vocab=300, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ff=64, max_positions=512)
EOS = 299
PROMPT = tuple(range(10, 60))


def weights(seed: int) -> Params:
    # Larger than a real init: distributions sharp enough that wrong attention shows.
    return init(CONFIG, jax.random.key(seed), scale=0.3)


def text(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids)


@pytest.fixture(scope="module")
def params() -> Params:
    return weights(0)


def sampler(params: Params, **options: Any) -> Sampler:
    # One shape for all tests: each other one would be compiled anew.
    defaults: dict[str, Any] = {"version": "v1", "slots": 4, "max_len": 256, "chunk": 32}
    return Sampler(params, CONFIG, text=text, **(defaults | {"eos_ids": frozenset({EOS})} | options))


@pytest.fixture
def engine(params: Params) -> Iterator[Sampler]:
    """A sampler whose rounds the test runs itself: nothing happens between them."""
    s = sampler(params)
    yield s
    s.stop()


def finish(engine: Sampler, *tickets: Ticket) -> list[Sample]:
    while not all(t.future.done() for t in tickets):
        engine.step()
    return [t.future.result() for t in tickets]


def sample(engine: Sampler, prompt: Sequence[int] = PROMPT, **options: Any) -> Sample:
    return finish(engine, engine.submit(SampleRequest(prompt, **({"max_tokens": 12} | options))))[0]


def close(a: Sample, b: Sample) -> bool:
    return a.ids == b.ids and np.allclose(a.logprobs, b.logprobs, atol=1e-4)


def full_log_probs(params: Params, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities [time, vocab] of every next token, from one uncached pass."""
    tokens = jnp.asarray([ids], jnp.int32)
    hidden, _ = forward(params, CONFIG, tokens, jnp.arange(len(ids))[None], causal_attend)
    return np.asarray(jax.nn.log_softmax(logits(params, CONFIG, hidden)[0], axis=-1))


@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 65, 140])
def test_greedy_decoding_with_the_cache_equals_full_forward_passes(engine: Sampler, length: int) -> None:
    prompt = [(7 * i) % 290 for i in range(length)]
    got = sample(engine, prompt, temperature=0.0)
    full = full_log_probs(weights(0), [*prompt, *got.ids])[length - 1 : -1]
    assert got.ids == full.argmax(axis=-1).tolist()
    assert np.allclose(got.logprobs, full.max(axis=-1), atol=1e-4)


def test_log_probs_are_the_policys_own_whatever_temperature_and_top_p(
    engine: Sampler, params: Params
) -> None:
    got = sample(engine, temperature=1.7, top_p=0.8, seed=5)
    full = full_log_probs(params, [*PROMPT, *got.ids])[len(PROMPT) - 1 : -1]
    assert np.allclose(got.logprobs, full[np.arange(len(got.ids)), got.ids], atol=1e-4)


def test_the_batched_attention_of_accelerators_gives_the_same(engine: Sampler, params: Params) -> None:
    other = sampler(params)
    other._by_row = False
    prompts = [PROMPT, PROMPT[:33], (*PROMPT, *range(100, 180)), (5,)]
    by_row = finish(engine, *(engine.submit(SampleRequest(p, 12, seed=3)) for p in prompts))
    batched = finish(other, *(other.submit(SampleRequest(p, 12, seed=3)) for p in prompts))
    assert all(close(a, b) for a, b in zip(by_row, batched, strict=True))


def test_a_sample_does_not_depend_on_its_neighbours(engine: Sampler) -> None:
    alone = sample(engine, seed=1)
    other = sampler(weights(0))
    crowd = [other.submit(SampleRequest(range(20 + i, 90 + i), 30, seed=i)) for i in range(6)]
    among = finish(other, other.submit(SampleRequest(PROMPT, 12, seed=1)), *crowd)[0]
    assert close(alone, among)


def test_the_same_seed_repeats_a_sample_and_another_does_not(params: Params) -> None:
    first, again, other = (sample(sampler(params), seed=s) for s in (2**40 + 1, 2**40 + 1, 1))
    assert close(first, again)
    assert first.ids != other.ids


def test_the_next_turn_computes_only_what_is_new(engine: Sampler, params: Params) -> None:
    first = sample(engine, seed=1)
    turn = (*PROMPT, *first.ids, 70, 71, 72)
    second = sample(engine, turn, seed=2)
    assert second.cached_tokens == len(PROMPT) + len(first.ids) - 1
    assert close(second, sample(sampler(params), turn, seed=2))


def test_a_prefix_shared_with_another_conversation_is_copied(engine: Sampler, params: Params) -> None:
    sample(engine, seed=1)
    fork = (*PROMPT[:40], *range(200, 230))
    forked = sample(engine, fork, seed=2)
    assert forked.cached_tokens == 40
    assert close(forked, sample(sampler(params), fork, seed=2))
    # The first conversation kept its slot: its next turn still finds all of itself.
    assert sample(engine, (*PROMPT, 1), max_tokens=1).cached_tokens == len(PROMPT)


def test_a_group_that_arrives_together_computes_its_prompt_once(engine: Sampler, params: Params) -> None:
    group = finish(engine, *(engine.submit(SampleRequest(PROMPT, 8, seed=i)) for i in range(4)))
    assert [s.cached_tokens for s in group] == [0, 49, 49, 49]
    alone = [sample(sampler(params), max_tokens=8, seed=i) for i in range(4)]
    assert all(close(a, b) for a, b in zip(group, alone, strict=True))


def test_more_conversations_than_slots_evict_the_one_used_longest_ago(engine: Sampler) -> None:
    prompts = [tuple(range(base, base + 20)) for base in (0, 40, 80, 120, 160)]
    for prompt in prompts:
        sample(engine, prompt, max_tokens=1)
    assert sample(engine, prompts[4], max_tokens=1).cached_tokens == 19
    assert sample(engine, prompts[0], max_tokens=1).cached_tokens == 0


def test_top_p_leaves_out_the_tail(engine: Sampler, params: Params) -> None:
    p = np.exp(full_log_probs(params, PROMPT)[-1])
    order = np.argsort(-p)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1].tolist())
    tickets = [engine.submit(SampleRequest(PROMPT, 1, top_p=0.6, seed=i)) for i in range(150)]
    drawn = {s.ids[0] for s in finish(engine, *tickets)}
    assert drawn <= nucleus
    assert len(drawn) > 1


def test_samples_follow_the_policys_distribution(engine: Sampler, params: Params) -> None:
    p = np.exp(full_log_probs(params, PROMPT)[-1])
    n = 240
    tickets = [engine.submit(SampleRequest(PROMPT, 1, seed=1000 + i)) for i in range(n)]
    counts = np.bincount([s.ids[0] for s in finish(engine, *tickets)], minlength=CONFIG.vocab)
    likely = p > 0.04
    deviation = np.sqrt(n * p[likely] * (1 - p[likely]))
    assert likely.sum() >= 2
    assert np.all(np.abs(counts[likely] - n * p[likely]) < 4.5 * deviation)


def test_an_end_token_ends_the_answer(params: Params) -> None:
    greedy = sample(sampler(params), temperature=0.0)
    end = greedy.ids[3]
    engine = sampler(params, eos_ids=frozenset({end}))
    got = sample(engine, temperature=0.0)
    assert got.ids == greedy.ids[: greedy.ids.index(end) + 1]
    assert (got.finish_reason, got.ended) == ("stop", True)


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(engine: Sampler) -> None:
    greedy = sample(engine, temperature=0.0)
    stop = text(greedy.ids[4:6])
    got = sample(engine, temperature=0.0, stop=("never", stop))
    assert text(got.ids).endswith(stop)
    assert len(got.ids) <= 6
    assert (got.finish_reason, got.stopped_by, got.ended) == ("stop", stop, False)


def test_an_answer_ends_where_the_context_does(engine: Sampler) -> None:
    prompt = [i % 250 for i in range(250)]
    got = sample(engine, prompt, max_tokens=100)
    assert len(got.ids) <= 6
    assert got.finish_reason == "length" or got.ended


def test_a_prompt_that_leaves_no_room_is_refused(engine: Sampler) -> None:
    with pytest.raises(PromptTooLong, match="256 tokens"):
        engine.submit(SampleRequest([1] * 256, 1))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SampleRequest([], 1), "empty"),
        (SampleRequest([300], 1), "vocabulary"),
        (SampleRequest([1], 0), "max_tokens"),
    ],
)
def test_a_senseless_request_is_refused(engine: Sampler, request_: SampleRequest, message: str) -> None:
    with pytest.raises(NexactorError, match=message):
        engine.submit(request_)


def test_a_full_queue_refuses(params: Params) -> None:
    engine = sampler(params, queue=2)
    engine.submit(SampleRequest(PROMPT, 1))
    engine.submit(SampleRequest(PROMPT, 1))
    with pytest.raises(QueueFull):
        engine.submit(SampleRequest(PROMPT, 1))


def test_cancelling_frees_the_slot_and_leaves_the_others_alone(params: Params) -> None:
    engine = sampler(params)
    expected = sample(sampler(params), PROMPT[:20], max_tokens=8, seed=1)
    long = engine.submit(SampleRequest(PROMPT, 150, seed=9))
    kept = engine.submit(SampleRequest(PROMPT[:20], 8, seed=1))
    others = [engine.submit(SampleRequest((1, 2, i), 150)) for i in range(2)]
    waiting = engine.submit(SampleRequest((1, 2, 3), 2))
    engine.step()
    assert (engine.stats().active, engine.stats().waiting) == (4, 1)
    assert long.future.cancel()
    finish(engine, kept, waiting)
    for ticket in others:
        ticket.future.cancel()
    engine.step()
    assert close(kept.future.result(), expected)
    assert engine.stats().cancelled == 3
    assert engine.stats().active == 0


def test_a_waiting_request_can_be_cancelled(engine: Sampler) -> None:
    ticket = engine.submit(SampleRequest(PROMPT, 5))
    assert ticket.future.cancel()
    engine.step()
    assert (engine.stats().waiting, engine.stats().active) == (0, 0)


def test_a_long_prompt_does_not_hold_up_those_that_answer(engine: Sampler) -> None:
    seen: list[int] = []
    answering = engine.submit(SampleRequest((1, 2), 40, seed=1), on_token=lambda i, _: seen.append(i))
    engine.step()
    long = engine.submit(SampleRequest([i % 200 for i in range(200)], 1))
    for _ in range(4):
        before = len(seen)
        engine.step()
        assert len(seen) == before + 1 or answering.future.done()
    assert not long.future.done()
    finish(engine, long, answering)
    assert answering.future.result().ids == seen


def test_a_swap_serves_new_requests_from_the_new_weights_and_drops_nothing(
    engine: Sampler, params: Params
) -> None:
    old_alone, new_alone = sample(sampler(params), seed=1), sample(sampler(weights(7)), seed=1)
    running = engine.submit(SampleRequest(PROMPT, 12, seed=1))
    for _ in range(3):
        engine.step()
    engine.swap(weights(7), "v2")
    after = engine.submit(SampleRequest(PROMPT, 12, seed=1))
    old, new = finish(engine, running, after)
    assert (old.version, new.version) == ("v1", "v2")
    assert close(old, old_alone)
    assert close(new, new_alone)
    assert new.cached_tokens == 0
    assert old.ids != new.ids
    # What the old weights computed is not reused, though the tokens are the same.
    again = sample(engine, (*PROMPT, *old.ids), max_tokens=2)
    assert again.cached_tokens <= len(PROMPT)


def test_stopping_fails_what_is_unfinished_and_refuses_more(params: Params) -> None:
    engine = sampler(params)
    engine.start()
    ticket = engine.submit(SampleRequest(PROMPT, 200))
    engine.stop()
    if not ticket.future.done() or ticket.future.exception() is not None:
        with pytest.raises(SamplerClosed):
            ticket.future.result()
    with pytest.raises(SamplerClosed):
        engine.submit(SampleRequest(PROMPT, 1))


def test_a_failure_of_the_worker_reaches_those_who_wait(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sampler(params)

    def broken() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", broken)
    ticket = engine.submit(SampleRequest(PROMPT, 1))
    engine.start()
    with pytest.raises(SamplerClosed, match="out of memory"):
        ticket.future.result(timeout=30)
    engine.stop()


def test_an_idle_sampler_compiles_what_it_may_need_and_answers_meanwhile(params: Params) -> None:
    engine, all_done = sampler(params), threading.Event()
    engine.warm_when_idle()
    engine._to_compile.append(all_done.set)
    engine.start()
    engine.submit(SampleRequest(PROMPT, 1)).future.result(timeout=120)
    assert all_done.wait(timeout=120)
    engine.stop()
    kinds = [p[0] for p in engine._programs]
    assert (kinds.count("decode"), kinds.count("prefill")) == (1, 4)


def test_after_warming_common_shapes_compile_no_more(params: Params) -> None:
    engine = sampler(params)
    engine.warm()
    compiled = engine.stats().compilations
    group = [engine.submit(SampleRequest(range(i, 90 - i), 4, seed=i)) for i in range(8)]
    finish(engine, *group)
    copies = {p for p in engine._programs if p[0] == "copy"}
    assert engine.stats().compilations - len(copies) == compiled
