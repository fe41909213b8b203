"""The demo's accounts: each zero it reports is counted from the log AND from a ledger that the log does not write.

events: every process journals the appends that were acknowledged to it. model calls: the policy server journals every
generation it completed. effects: the file tools journal every change they applied. runs: the demo's own list.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nexactor.events import types as ev
from nexactor.events.cursor import START
from nexactor.events.errors import LogError
from nexactor.events.log import EventLog


class Accounts(msgspec.Struct):
    """What the log holds, and how it compares with the ledgers. Every `*_lost` and `*_repeated` should be 0."""

    runs: int
    events: int
    model_calls: int
    acknowledged: int
    generations: int
    effects: int
    runs_lost: int
    runs_failed: int
    events_lost: int
    model_calls_repeated: int
    effects_repeated: int
    reattached: int
    outcome_unknown: int
    splits: int
    activations: int
    steps_irregular: int


async def audit(
    log: EventLog,
    *,
    runs: Iterable[str],
    append_journals: Iterable[Path],
    generation_counts: dict[str, int],
    effect_counts: Iterable[dict[str, int]],
) -> Accounts:
    """Walk the whole log once and hold it against the ledgers."""
    by_stream: dict[str, dict[int, str]] = {}
    finished: Counter[str] = Counter()
    failed = 0
    steps: list[ev.LearnerStep] = []
    ended_calls: Counter[str] = Counter()
    ended_effects: Counter[str] = Counter()
    sampled: set[str] = set()
    changing: set[str] = set()
    changed: set[str] = set()
    events = reattached = unknown = activations = splits = 0
    lengths: dict[str, int] = {}
    async for recorded in log.subscribe(START, follow=False):
        events += 1
        by_stream.setdefault(recorded.stream, {})[recorded.version] = recorded.hash.hex()
        match recorded.event:
            case ev.RunFinished() as run:
                finished[recorded.envelope.run] += 1
                failed += run.status != "finished"
            case ev.LearnerStep() as step:
                steps.append(step)
            case ev.ActorActivated():
                activations += 1
            case ev.ModelCallFinished() as call:
                ended_calls[call.call_id] += 1
                reattached += call.reattached
                if call.tokens is not None:
                    sampled.add(call.call_id)
                    splits += call.tokens.prompt_keep < lengths.get(recorded.stream, 0)
                    kept, new = call.tokens.prompt_keep, len(call.tokens.prompt_ids) + len(call.tokens.ids)
                    lengths[recorded.stream] = kept + new // 4
            case ev.ToolCallStarted() as tool if tool.repeat == "idempotent":
                changing.add(tool.effect_id)
            case ev.ToolCallFinished() as tool:
                ended_effects[tool.effect_id] += 1
                changed |= changing & {tool.effect_id}
            case ev.ToolCallFailed() as tool:
                ended_effects[tool.effect_id] += 1
                unknown += tool.outcome_unknown
    lost, acknowledged = _missing(by_stream, append_journals)
    applied: Counter[str] = Counter()
    for counts in effect_counts:
        applied.update(counts)
    # A ledger that lacks what the log has would make its zero worthless.
    for what, logged, ledger in (
        ("policy server's answers", sampled, generation_counts.keys()),
        ("tools' effects", changed, applied.keys()),
    ):
        if lacking := logged - ledger:
            raise LogError(
                f"the ledger of the {what} lacks {len(lacking)} that the log has, {min(lacking)} for one"
            )
    wanted = set(runs)
    return Accounts(
        runs=len(finished),
        events=events,
        model_calls=len(ended_calls),
        acknowledged=acknowledged,
        generations=sum(generation_counts.values()),
        effects=sum(applied.values()),
        runs_lost=len(wanted - finished.keys()),
        runs_failed=failed,
        events_lost=lost,
        # Generated and in no run: paid for, then asked again under another id.
        model_calls_repeated=_extra(generation_counts)
        + _extra(ended_calls)
        + len(generation_counts.keys() - ended_calls.keys()),
        effects_repeated=_extra(applied) + _extra(ended_effects),
        reattached=reattached,
        outcome_unknown=unknown,
        splits=splits,
        activations=activations,
        steps_irregular=_irregular(steps),
    )


def _irregular(steps: list[ev.LearnerStep]) -> int:
    """Steps out of the sequence 1, 2, 3..., and model calls trained on in two steps: 0 after a true restart."""
    out_of_order = sum(step.step != n for n, step in enumerate(steps, start=1))
    return out_of_order + _extra(Counter(id for step in steps for id in step.events))


def _missing(by_stream: dict[str, dict[int, str]], journals: Iterable[Path]) -> tuple[int, int]:
    """(events that are missing or differ, acknowledged appends): gaps in versions, and journalled appends not there."""
    lost = 0
    for versions in by_stream.values():
        lost += max(versions) - len(versions)
    acknowledged = 0
    for journal in journals:
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # The last line of a process that was killed while it wrote.
            acknowledged += 1
            lost += by_stream.get(entry["stream"], {}).get(entry["version"]) != entry["hash"]
    return lost, acknowledged


def _extra(counts: dict[str, int]) -> int:
    """How many times anything was counted beyond the first."""
    return sum(n - 1 for n in counts.values() if n > 1)
