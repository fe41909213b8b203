"""`nexactor demo`: before, demonstrations and training with kills in between, after, and the accounts.

Everything happens in the processes and the log that users have: the demo only starts, kills, counts and reports.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

from nexactor.cli.demo.ledger import Accounts, audit
from nexactor.cli.demo.plan import DemoPlan
from nexactor.cli.demo.processes import Child
from nexactor.cli.demo.report import Results, success, write_report
from nexactor.events.cursor import START
from nexactor.events.errors import ConfigError, NexactorError
from nexactor.events.log import Filter
from nexactor.events.types import LearnerStep, ModelCallFinished, PolicyPublished, RunStarted
from nexactor.rollouts import Outcome, roll_out
from nexactor.spec import SpecTree
from nexactor.spec_yaml import load_spec
from nexactor.system import System
from nexactor.tools.environment import Task

Say = Callable[[str], None]
Tick = Callable[[str, int, int], None]
LEARNER = "demo"
MARKER = ".nexactor-demo"
GRACE_S = 300.0
"""How long anything may take that should take seconds."""


class Demo:
    """One demo in one folder. `say` prints a line; `tick(phase, done, total)` moves a progress bar."""

    def __init__(self, *, out: Path, policy: str, agent: Path, plan: DemoPlan, say: Say, tick: Tick) -> None:
        self.out, self.policy, self.agent, self.plan = out, policy, agent, plan
        self.say, self.tick = say, tick
        self.kills: Counter[str] = Counter()
        self.runs: list[str] = []
        self.model_port = 0
        self._stack = AsyncExitStack()
        self._began = time.monotonic()
        self._batch = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """The whole demo; returns what it wrote to summary.json."""
        self._prepare()
        async with AsyncExitStack() as self._stack:
            await self._start()
            before = await self._evaluate(
                "before",
                kills=[
                    (0.2, self._kill_node),
                    (0.55, self._kill_policy),
                ],
            )
            validation = await self._learn()
            after = await self._evaluate("after", kills=[])
            accounts = await self._account()
            steps, versions, played = await self._steps()
        return write_report(
            self.out,
            Results(
                self.policy,
                before,
                after,
                validation,
                accounts,
                steps,
                versions,
                played,
                replays=await self._replay(),
                kills=dict(self.kills),
                seconds=time.monotonic() - self._began,
            ),
        )

    # ---- setting up -----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self.out.exists() and any(self.out.iterdir()) and not (self.out / MARKER).exists():
            raise ConfigError(f"{self.out} holds something else than a demo: choose another --out")
        shutil.rmtree(self.out, ignore_errors=True)
        for folder in ("data", "logs", "journals", "work"):
            (self.out / folder).mkdir(parents=True)
        (self.out / MARKER).touch()

    async def _start(self) -> None:
        from nexactor.learner.fetch import resolve_policy
        from nexactor.tools.expert_server import serve_expert
        from nexactor.tools.workspace import Workspace

        self.environment = Workspace()
        self.policy_path = resolve_policy(self.policy)
        self.system = await self._stack.enter_async_context(
            System(
                data=self.out / "data", name="demo", host=False, journal=self.out / "journals" / "demo.jsonl"
            )
        )
        self.say(
            f"broker at {self.system.broker.url if self.system.broker else ''}, log in {self.out / 'data'}"
        )
        self.expert_url = await self._stack.enter_async_context(serve_expert())
        self.model_port = _free_port()
        self.model_url = f"http://127.0.0.1:{self.model_port}/v1"
        self.server = self._child(
            "policy", ["policy", "serve", str(self.policy_path), "--port", str(self.model_port)]
        )
        self.nodes = [self._node("node-a"), self._node("node-b")]
        for child in (self.server, *self.nodes):
            await child.start()
            self._stack.push_async_callback(child.stop)
        self._stack.push_async_callback(self._stop_nodes_first)
        await self._served("")
        self.say(
            f"policy server with {self.policy} at {self.model_url}, expert at {self.expert_url}, two nodes"
        )
        while len([n for n in self.system.node.transport.live().values() if n.kinds]) < 2:
            self._check()
            await asyncio.sleep(0.1)

    def _node(self, name: str) -> Child:
        return self._child(name, ["node", "--name", name])

    def _child(self, name: str, arguments: list[str]) -> Child:
        return Child(
            name,
            ["--data", str(self.out / "data"), "--journal", str(self.out / "journals"), *arguments],
            log=self.out / "logs" / f"{name}.log",
            env={"OPENAI_API_KEY": "none", "PYTHONUNBUFFERED": "1"},
        )

    async def _stop_nodes_first(self) -> None:
        for child in self.nodes:
            await child.stop()

    def _check(self) -> None:
        for child in (self.server, *self.nodes):
            child.check()

    def _spec(self, url: str, **llm: Any) -> SpecTree:
        """The team, talking to the policy or to the expert: the same files, another endpoint."""
        return load_spec(self.agent, env={"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"})

    async def _served(self, version: str) -> None:
        """Wait until the policy server answers; with these weights, if a version is named."""
        import aiohttp

        deadline = time.monotonic() + GRACE_S
        async with aiohttp.ClientSession() as session:
            while True:
                self._check()
                if time.monotonic() > deadline:
                    raise NexactorError(
                        f"the policy server did not come up with {version or 'its policy'}: {self.server.log}"
                    )
                try:
                    async with session.get(f"http://127.0.0.1:{self.model_port}/readyz") as response:
                        ready = response.status == 200
                    if ready and not version:
                        return
                    async with session.get(f"{self.model_url}/models") as response:
                        if ready and version in await response.text():
                            return
                except (aiohttp.ClientError, OSError):
                    pass  # Not up yet, or killed a moment ago.
                await asyncio.sleep(0.2)

    # ---- kills ----------------------------------------------------------------------------------------------

    async def _kill_node(self) -> None:
        await self._kill("node", self.nodes[0])

    async def _kill_policy(self) -> None:
        await self._kill("policy server", self.server)

    async def _kill_learner(self) -> None:
        await self._kill("learner", self.learner)

    async def _kill_broker(self) -> None:
        from nexactor.events.broker import kill_server

        # The keepers in all processes see it gone; one of them starts it again.
        if kill_server(self.out / "data") is None:
            raise NexactorError("the demo's broker has no process to kill")
        self._killed("broker")

    async def _kill(self, kind: str, child: Child) -> None:
        if not await child.kill():
            raise NexactorError(f"the {kind} had ended by itself before it could be killed: see {child.log}")
        self._killed(kind)
        await child.start()

    def _killed(self, kind: str) -> None:
        self.kills[kind] += 1
        self.say(f"SIGKILL to the {kind} in the middle of its work; started again")

    # ---- evaluation -----------------------------------------------------------------------------------------

    async def _evaluate(self, phase: str, kills: list[tuple[float, Callable[[], Any]]]) -> list[Outcome]:
        """The held-out tasks, and those of a family that is never trained on, by the policy as it is served now."""
        tasks = [
            *self.environment.tasks("heldout", self.plan.held_out),
            *self.environment.tasks("novel", self.plan.novel),
        ]
        done = solved = 0
        waiting = list(kills)
        began = time.monotonic()

        async with asyncio.TaskGroup() as group:

            def on_outcome(outcome: Outcome) -> None:
                nonlocal done, solved
                done += 1
                solved += outcome.success
                self._check()
                self.tick(f"held-out tasks {phase} training ({solved} solved)", done, len(tasks))
                while waiting and done >= waiting[0][0] * len(tasks):
                    _, how = waiting.pop(0)
                    group.create_task(how())

            self.tick(f"held-out tasks {phase} training", 0, len(tasks))
            outcomes = await self._roll(tasks, self._spec(self.model_url), f"heldout-{phase}", on_outcome)
        r = success(outcomes, "heldout")
        self.say(
            f"success {phase}: {r}; never trained family: {success(outcomes, 'novel')}"
            f" [{time.monotonic() - began:.0f} s]"
        )
        return outcomes

    async def _roll(
        self,
        tasks: list[Task] | Any,
        spec: SpecTree,
        role: str,
        on_outcome: Callable[[Outcome], None] | None = None,
        parallel: int = 0,
    ) -> list[Outcome]:
        return await roll_out(
            self.system,
            self.environment,
            tasks,
            spec,
            root=self.out / "work",
            labels={"role": role},
            parallel=parallel or self.plan.parallel,
            on_start=lambda _, run: self.runs.append(run),
            on_outcome=on_outcome,
        )

    # ---- learning -------------------------------------------------------------------------------------------

    async def _learn(self) -> list[Outcome]:
        """Demonstrations stream into the log, the learner follows, validation tasks are played as it goes."""
        config = self.out / "learner.yaml"
        config.write_text(self._learner_config())
        self.learner = self._child("learner", ["learn", "run", str(config)])
        await self.learner.start()
        self._stack.push_async_callback(self.learner.stop)
        validation: list[Outcome] = []
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            demonstrations = group.create_task(self._demonstrate())
            watching = group.create_task(self._watch_steps(began))
            playing = group.create_task(self._validate(validation))
            guarding = group.create_task(self._guard(watching))
            await demonstrations
            await watching
            guarding.cancel()
            async with self._batch:  # What is being played is played to its end.
                playing.cancel()
        async with asyncio.timeout(GRACE_S):
            code = await self.learner.wait()
        if code != 0:
            self.learner.check()
        version = await self._newest_version()
        await self._served(version)
        self.say(f"trained; the policy server answers with {version} [{time.monotonic() - began:.0f} s]")
        return validation

    async def _guard(self, watching: asyncio.Task[None]) -> None:
        """A process that ended when it should not ends the demo, rather than leave it waiting."""
        while not watching.done():
            self._check()
            self.learner.check()
            if self.learner.ended_well:
                await asyncio.wait([watching], timeout=GRACE_S)
                if not watching.done():
                    raise NexactorError(f"the learner ended before its last step: see {self.learner.log}")
            await asyncio.sleep(1.0)

    def _learner_config(self) -> str:
        import yaml

        p = self.plan
        return yaml.safe_dump(
            {
                "name": LEARNER,
                "policy": str(self.policy_path),
                "out": str(self.out / "learner"),
                "data": {"labels": {"role": "expert"}, "min_reward": 1.0},
                "batch": p.runs_per_step,
                "max_steps": p.max_steps,
                "optimizer": {"lr": p.learning_rate, "warmup": max(1, p.max_steps // 10)},
                "publish_every": p.publish_every,
                "checkpoint_every": max(1, p.publish_every // 2),
            },
            sort_keys=False,
        )

    async def _demonstrate(self) -> None:
        tasks = self.environment.tasks("train", self.plan.demonstrations)
        done = solved = 0
        killed = False

        async with asyncio.TaskGroup() as group:

            def on_outcome(outcome: Outcome) -> None:
                nonlocal done, solved, killed
                done += 1
                solved += outcome.success
                self._check()
                self.tick(f"expert's demonstrations ({solved} solved)", done, len(tasks))
                if not killed and done >= 0.4 * len(tasks):
                    killed = True
                    group.create_task(self._kill_broker())

            await self._roll(tasks, self._spec(self.expert_url), "expert", on_outcome, parallel=8)
        self.say(f"{solved} of {len(tasks)} demonstrations recorded by the same agents in the same log")
        if solved < len(tasks):
            raise NexactorError(f"the expert failed {len(tasks) - solved} of its own tasks: see {self.out}")

    async def _watch_steps(self, began: float) -> None:
        """Follow the learner's own events until its last step; kill it once on the way."""
        total = self.plan.max_steps
        async with aclosing(self.system.log.subscribe(START, filter=Filter(run=LEARNER))) as events:
            async for recorded in events:
                self.learner.check()
                match recorded.event:
                    case PolicyPublished() as published:
                        self.say(f"policy {published.version} published at step {published.step}")
                        if published.step >= total:
                            return
                    case LearnerStep() as step:
                        loss = step.metrics.get("loss", 0.0)
                        self.tick(f"gradient steps (loss {loss:.3f})", step.step, total)
                        if step.step >= total * 0.35 and not self.kills["learner"]:
                            await self._kill_learner()
                        elif time.monotonic() - began > self.plan.train_seconds:
                            self.say("the time for training is up: the learner finishes its step")
                            await self.learner.stop(grace=120)
                            return

    async def _validate(self, outcomes: list[Outcome]) -> None:
        """Play training-split tasks nobody trains on whenever new weights are published: the curve's points.

        They start at the moment of publishing, so the weights are swapped under running agents.
        """
        spec = self._spec(self.model_url)
        offset = 100_000
        async for recorded in self.system.log.subscribe(
            START, filter=Filter(run=LEARNER, types=("PolicyPublished",))
        ):
            assert isinstance(recorded.event, PolicyPublished)
            tasks = self.environment.tasks("train", self.plan.validation, offset)
            offset += len(tasks)
            async with self._batch:
                outcomes += await self._roll(tasks, spec, "validation", parallel=4)

    async def _newest_version(self) -> str:
        version = ""
        async for recorded in self.system.log.subscribe(
            START, filter=Filter(run=LEARNER, types=("PolicyPublished",)), follow=False
        ):
            if isinstance(recorded.event, PolicyPublished):
                version = recorded.event.version
        return version

    # ---- accounts -------------------------------------------------------------------------------------------

    async def _account(self) -> Accounts:
        from nexactor.learner.answers import count_generations
        from nexactor.tools.journal import count_applied

        self.say("comparing the log with the ledgers")
        await self._stop_nodes_first()
        return await audit(
            self.system.log,
            runs=self.runs,
            append_journals=sorted((self.out / "journals").glob("*.jsonl")),
            generation_counts=count_generations(self.out / "data" / "policy" / "answers"),
            effect_counts=[count_applied(p) for p in sorted((self.out / "work").rglob("*.journal.jsonl"))],
        )

    async def _steps(self) -> tuple[list[dict[str, float]], dict[str, int], dict[str, str]]:
        """(steps with their metrics, step of each policy version, version that answered each validation run)."""
        steps: dict[int, dict[str, float]] = {}
        versions: dict[str, int] = {}
        played: dict[str, str] = {}
        roles: dict[str, str] = {}
        async for recorded in self.system.log.subscribe(START, follow=False):
            match recorded.event:
                case LearnerStep() as step:
                    steps[step.step] = {"step": step.step, **step.metrics}
                case PolicyPublished() as published:
                    versions[published.version] = published.step
                case RunStarted() as run:
                    roles[recorded.envelope.run] = run.labels.get("role", "")
                case ModelCallFinished() as call if roles.get(recorded.envelope.run) == "validation":
                    played[recorded.envelope.run] = call.policy_version
        return [steps[k] for k in sorted(steps)], versions, played

    async def _replay(self) -> dict[str, Any]:
        """Replay and verify every run in a fresh process, the model server and the nodes gone."""
        self.say("replaying every run in a fresh process, with the policy server off")
        report = self.out / "replay.json"
        child = self._child("replay", ["replay", "--all", "--verify", "--json"])
        with report.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*child._command, stdout=output, env=child._env)
            code = await process.wait()
        lines = report.read_text().splitlines()
        if not lines:
            raise NexactorError(f"the replay printed nothing (exit code {code})")
        return dict(json.loads(lines[-1]))


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
