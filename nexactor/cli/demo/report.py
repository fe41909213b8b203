"""What the demo found, as summary.json and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from nexactor.cli.demo.curve import draw_curve
from nexactor.cli.demo.ledger import Accounts
from nexactor.rollouts import Outcome
from nexactor.statistics import Rate, rate


class Results(msgspec.Struct, frozen=True):
    """Everything a demo measured.

    `steps` are the learner's, with their metrics; `versions` the step of each published policy; `played` the policy
    version that answered each validation run.
    """

    policy: str
    before: list[Outcome]
    after: list[Outcome]
    validation: list[Outcome]
    accounts: Accounts
    steps: list[dict[str, float]]
    versions: dict[str, int]
    played: dict[str, str]
    replays: dict[str, Any]
    kills: dict[str, int]
    seconds: float


def success(outcomes: list[Outcome], split: str) -> Rate:
    """The rate over tasks of a split; infrastructure failures are no verdicts and are left out."""
    return _rate([o for o in outcomes if o.task.split == split])


def write_report(out: Path, r: Results) -> dict[str, Any]:
    """Draw learning_curve.png and write summary.json into `out`; returns the summary."""
    by_step: dict[int, list[Outcome]] = {}
    for outcome in r.validation:
        by_step.setdefault(r.versions.get(r.played.get(outcome.run, ""), 0), []).append(outcome)
    before, after = success(r.before, "heldout"), success(r.after, "heldout")
    draw_curve(
        out / "learning_curve.png",
        steps=r.steps,
        validation=[(step, success(o, "train")) for step, o in sorted(by_step.items())],
        before=before,
        after=after,
        title=f"{r.policy} on workspace tasks: SFT from the live log of its own agents",
    )
    a = r.accounts
    summary: dict[str, Any] = {
        "success_before": before.rate,
        "success_after": after.rate,
        "success_before_interval": [before.low, before.high],
        "success_after_interval": [after.low, after.high],
        "held_out_tasks": min(before.n, after.n),
        "novel_family": {
            "before": msgspec.to_builtins(success(r.before, "novel")),
            "after": msgspec.to_builtins(success(r.after, "novel")),
        },
        "families": _families(r.before, r.after),
        "runs": a.runs,
        "events": a.events,
        "model_calls": a.model_calls,
        "kills": r.kills,
        "runs_lost": a.runs_lost,
        "runs_failed": a.runs_failed,
        "events_lost": a.events_lost,
        "model_calls_repeated": a.model_calls_repeated,
        "effects_repeated": a.effects_repeated,
        "replays_verified": r.replays["verified"],
        "replays_failed": r.replays["failed"],
        "splits": a.splits,
        "seconds": round(r.seconds, 1),
        "infra_errors": sum(bool(o.infra) for o in (*r.before, *r.after, *r.validation)),
        "ledgers": {
            "appends_acknowledged": a.acknowledged,
            "generations": a.generations,
            "effects": a.effects,
        },
        "activations": a.activations,
        "model_calls_reattached": a.reattached,
        "tool_outcomes_unknown": a.outcome_unknown,
        "learner_steps": len(r.steps),
        "learner_steps_irregular": a.steps_irregular,
        "policy": r.policy,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _rate(outcomes: list[Outcome]) -> Rate:
    counted = [o for o in outcomes if not o.infra]
    return rate(sum(o.success for o in counted), len(counted))


def _families(before: list[Outcome], after: list[Outcome]) -> dict[str, dict[str, Any]]:
    return {
        family: {
            name: msgspec.to_builtins(_rate([o for o in outcomes if o.task.family == family]))
            for name, outcomes in (("before", before), ("after", after))
        }
        for family in sorted({o.task.family for o in (*before, *after)})
    }
