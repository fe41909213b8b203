"""Rollouts: agents take an environment's tasks, the checker scores what they left, the reward joins the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio.to_thread
import msgspec

from nexactor.events.errors import VersionConflict
from nexactor.events.ids import new_run_id
from nexactor.events.log import Meta
from nexactor.events.types import Annotated, Event, RewardAssigned
from nexactor.spec import SpecTree
from nexactor.system import System
from nexactor.tools.environment import Environment, EnvironmentFault, Task


class Outcome(msgspec.Struct, frozen=True):
    """One task's rollout. `infra` is the reason why it has no reward: trouble that says nothing about the policy."""

    task: Task
    run: str
    status: str
    reward: float
    infra: str = ""

    @property
    def success(self) -> bool:
        return not self.infra and self.reward >= 1.0


async def roll_out(
    system: System,
    environment: Environment,
    tasks: Sequence[Task],
    agent: SpecTree,
    *,
    root: Path,
    labels: Mapping[str, str],
    parallel: int = 16,
    on_start: Callable[[Task, str], None] | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run every task once, `parallel` at a time; outcomes in task order.

    Each run gets a workspace of its own, `<root>/<run>`. The reward is appended to `annotation/<run>`. A run that
    failed for infrastructure's sake, and a checker that could not check, give no reward but an annotation.
    """
    gate = asyncio.Semaphore(parallel)

    async def one(task: Task) -> Outcome:
        async with gate:
            run = new_run_id()
            workspace = await anyio.to_thread.run_sync(environment.reset, task, root / run)
            started = await system.start(
                agent,
                task.prompt,
                run=run,
                workspace=workspace,
                labels={
                    "env": task.env,
                    "split": task.split,
                    "family": task.family,
                    "task": task.id,
                    **labels,
                },
            )
            if on_start is not None:
                on_start(task, run)
            result = await started.wait()
            outcome, event = await _score(environment, task, run, workspace, result.status, result.result)
            await _annotate(system, run, event)
            if on_outcome is not None:
                on_outcome(outcome)
            return outcome

    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(one(task)) for task in tasks]
    return [task.result() for task in waiting]


async def _score(
    environment: Environment, task: Task, run: str, workspace: Path, status: str, answer: str
) -> tuple[Outcome, Event]:
    fault = "" if status == "finished" else f"the run {status}: {answer}"
    if not fault:
        try:
            score = await anyio.to_thread.run_sync(environment.score, task, workspace, answer)
        except Exception as error:  # An environment's bug is its own, and says nothing about the policy.
            fault = str(error) if isinstance(error, EnvironmentFault) else f"{type(error).__name__}: {error}"
        else:
            event = RewardAssigned(
                run=run, reward=score.reward, source=f"{environment.name}/checker", parts=dict(score.parts)
            )
            return Outcome(task, run, status, score.reward), event
    return Outcome(task, run, status, 0.0, fault), Annotated(run=run, key="infra_error", value=fault)


async def _annotate(system: System, run: str, event: Event) -> None:
    stream = f"annotation/{run}"
    while True:
        version = await system.log.version(stream)
        try:
            await system.log.append(
                stream, [event], expected_version=version, meta=Meta(node=system.node.id, correlation=run)
            )
            return
        except VersionConflict:
            continue  # Somebody else annotated the run at the same time: both are kept.
