"""The front door: a broker, a log and a node in one object, and runs that one can start, watch and await."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from nexactor.agent.model import ModelClient
from nexactor.agent.shell import AgentActor, CancelAgent, StartAgent
from nexactor.events.cursor import START
from nexactor.events.envelope import Recorded
from nexactor.events.errors import ConfigError
from nexactor.events.ids import new_run_id
from nexactor.events.log import EventLog, Filter
from nexactor.events.types import RunFinished
from nexactor.node import Node
from nexactor.spec import NAME_RULE, AgentSpec, LLMConfig, SpecTree, SubAgentEntry, ToolEntry, valid_name
from nexactor.spec_yaml import load_spec
from nexactor.tools import Tool
from nexactor.transport import Transport

if TYPE_CHECKING:
    from nexactor.events.broker import Broker


class Agent:
    """An agent defined in Python; `load_spec` gives the same from YAML.

    `tools` are functions decorated with `@tool`; `sub_agents` are Agents, called like tools with one `message`.
    """

    def __init__(
        self,
        name: str,
        *,
        llm: LLMConfig,
        system_prompt: str = "",
        description: str = "",
        tools: Sequence[Tool] = (),
        sub_agents: Sequence[Agent] = (),
        stop_tools: Sequence[str] = (),
        max_iterations: int = 100,
    ) -> None:
        for sub in sub_agents:
            if not valid_name(sub.spec.name):
                raise ConfigError(f"agent {sub.spec.name!r}: {NAME_RULE}")
        self.tools = tuple(tools)
        self.sub_agents = tuple(sub_agents)
        self.spec: AgentSpec = AgentSpec(
            name=name,
            llm=llm,
            system_prompt=system_prompt,
            description=description,
            tools=tuple(ToolEntry(t.spec, t.binding, t.repeat) for t in tools),
            sub_agents=tuple(
                SubAgentEntry(a.spec.name, a.spec.description, a.spec.digest) for a in sub_agents
            ),
            stop_tools=tuple(stop_tools),
            max_iterations=max_iterations,
        )

    def tree(self) -> SpecTree:
        """This agent's spec with those of all below it."""
        specs = {self.spec.digest: self.spec}
        for sub in self.sub_agents:
            specs |= sub.tree().all
        return SpecTree(self.spec, specs)

    def local_tools(self) -> dict[str, Tool]:
        """The tools of this agent and all below it, by binding."""
        tools = {t.binding: t for t in self.tools}
        for sub in self.sub_agents:
            tools |= sub.local_tools()
        return tools


class RunResult(msgspec.Struct, frozen=True):
    """How a run ended. `status`: finished, failed or cancelled; `result`: the answer, or what went wrong."""

    run: str
    status: str
    result: str


class Run:
    """A run in progress or ended. Await `wait()`; iterate `events()`."""

    def __init__(self, system: System, id: str) -> None:
        self.system = system
        self.id = id

    async def wait(self) -> RunResult:
        """The end of the run."""
        return await self.system.finished(self.id)

    def events(self) -> AsyncIterator[Recorded]:
        """All events of the run so far, all its agents, in log order."""
        return self.system.log.subscribe(START, filter=Filter(run=self.id), follow=False)

    async def cancel(self, reason: str = "") -> None:
        """Stop the root agent and all below it."""
        address = f"agent/{self.id}"
        await self.system.node.command(address, CancelAgent(reason), id=f"{address}#cancel")


class System:
    """Connects, hosts a node, runs agents. `async with System() as system: ...`

    Without `url` and NEXACTOR_NATS_URL it starts (or shares) an embedded broker in `data` (default ./.nexactor).
    `host=False` makes it a client that starts runs on other nodes. `journal` keeps a ledger of acknowledged appends.
    `log` and `transport`, given together, replace the broker (tests, simulation).
    """

    def __init__(
        self,
        *,
        data: str | Path | None = None,
        url: str | None = None,
        namespace: str = "default",
        name: str = "node",
        host: bool = True,
        journal: Path | None = None,
        log: EventLog | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._settings = (Path(data) if data is not None else None, url, namespace)
        self._name, self._host, self._journal = name, host, journal
        self._given = (log, transport)
        self._stack = AsyncExitStack()
        self._waiting: dict[str, asyncio.Future[RunResult]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._watching = asyncio.Lock()
        self.local_tools: dict[str, Tool] = {}
        self.broker: Broker | None = None
        self.log: EventLog
        self.node: Node

    async def __aenter__(self) -> System:
        async with AsyncExitStack() as stack:
            log, transport = self._given
            if log is None or transport is None:
                from nexactor.events.broker import connect
                from nexactor.events.jetstream import JetStreamLog
                from nexactor.transport_nats import NatsTransport

                data, url, namespace = self._settings
                self.broker = await connect(data=data, url=url, namespace=namespace)
                stack.push_async_callback(self.broker.close)
                log = await JetStreamLog.open(self.broker, journal=self._journal)
                stack.push_async_callback(log.close)
                transport = NatsTransport(self.broker)
            self.log = log
            model = ModelClient()
            stack.push_async_callback(model.close)
            self.node = await stack.enter_async_context(
                Node(
                    log,
                    transport,
                    actors=(AgentActor,) if self._host else (),
                    name=self._name,
                    services={"model": model, "tools": self.local_tools},
                )
            )
            stack.push_async_callback(self._stop_watching)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def start(
        self,
        agent: Agent | SpecTree | str | Path,
        task: str,
        *,
        run: str = "",
        workspace: Path | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Run:
        """Give a task to an agent; returns once the task is durable: from then on it survives every crash.

        `agent` is an Agent, a loaded spec, or the path of a YAML file. The same `run` id twice starts it once.
        """
        if isinstance(agent, str | Path):
            agent = load_spec(agent)
        tree = agent.tree() if isinstance(agent, Agent) else agent
        digest = await tree.store(self.log)
        run = run or new_run_id()
        address = f"agent/{run}"
        if isinstance(agent, Agent) and agent.local_tools():
            self.local_tools.update(agent.local_tools())
            if not self._host:
                raise ConfigError("tools defined in this process need a node in it: use System(host=True)")
            await self.node.transport.place(address, self.node.id, instead_of=None)
        context = {"workspace": str(Path.cwd() / workspace)} if workspace is not None else {}
        await self._watch(run)
        await self.node.command(
            address,
            StartAgent(spec=digest, input=task, context=context, labels=dict(labels or {})),
            id=f"{address}#start",
        )
        return Run(self, run)

    async def run(self, agent: Agent | SpecTree | str | Path, task: str, **options: Any) -> RunResult:
        """`start`, then wait for the end."""
        return await (await self.start(agent, task, **options)).wait()

    async def finished(self, run: str) -> RunResult:
        """Wait for the end of any run, started here or elsewhere, now or before."""
        future = await self._watch(run)
        if not future.done():
            async for recorded in self.log.subscribe(
                START, filter=Filter(run=run, types=(RunFinished.__name__,)), follow=False
            ):
                self._ended(recorded)
        try:
            return await asyncio.shield(future)
        finally:
            self._waiting.pop(run, None)

    # ---- one follower of the log serves all waiting runs ----------------------------------------------------

    async def _watch(self, run: str) -> asyncio.Future[RunResult]:
        async with self._watching:
            if self._watcher is None or self._watcher.done():
                head = await self.log.head()
                self._watcher = asyncio.get_running_loop().create_task(self._follow(head))
        if run not in self._waiting:
            self._waiting[run] = asyncio.get_running_loop().create_future()
        return self._waiting[run]

    async def _follow(self, head: Any) -> None:
        try:
            async for recorded in self.log.subscribe(head, filter=Filter(types=(RunFinished.__name__,))):
                self._ended(recorded)
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)

    def _ended(self, recorded: Recorded) -> None:
        event = recorded.event
        future = self._waiting.get(recorded.envelope.run)
        if isinstance(event, RunFinished) and future is not None and not future.done():
            future.set_result(RunResult(recorded.envelope.run, event.status, event.result))

    async def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
