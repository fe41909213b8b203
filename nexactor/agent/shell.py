"""The agent's shell: an actor that performs what `decide` decides, each effect durable before it starts.

All appends go through the mailbox, one at a time. An effect that ends posts its event back to the mailbox; the event,
what it makes `decide` want, and the start of that are one append. Whatever is in flight when the process
dies is found pending in the folded state, and taken up again by the next owner.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from nexactor.actor import Actor
from nexactor.agent.decide import CallAgent, CallModel, CallTool, Effect, Fail, Finish, advance
from nexactor.agent.model import ModelClient, ModelError
from nexactor.agent.state import AgentState, Pending, evolve, render
from nexactor.events import types as ev
from nexactor.events.errors import NexactorError, VersionConflict
from nexactor.events.ids import run_of
from nexactor.events.log import Meta
from nexactor.spec import AgentSpec, load_stored_spec
from nexactor.tools import Tool, ToolContext, ToolError, load_tool
from nexactor.transport import Inbound

if TYPE_CHECKING:
    from nexactor.node import Node


class StartAgent(msgspec.Struct, frozen=True):
    """Durable command: begin. `labels` are a root's only; `context` (workspace, ...) is inherited down the tree."""

    spec: str
    input: str
    parent: str = ""
    parent_effect: str = ""
    depth: int = 0
    context: dict[str, str] = {}
    labels: dict[str, str] = {}


class SubAgentEnded(msgspec.Struct, frozen=True):
    """Durable command: a child's answer to the parent's effect `effect_id`."""

    effect_id: str
    status: str
    result: str


class CancelAgent(msgspec.Struct, frozen=True):
    """Durable command: stop, with all descendants."""

    reason: str = ""


class AgentStatus(msgspec.Struct, frozen=True):
    """Ask: where the agent is. Answered with a dict of version, status, iterations and pending effects."""


class _Ended(msgspec.Struct, frozen=True):
    """From an effect's task to the mailbox: these events happened. `effect_id` guards against stale ones."""

    effect_id: str
    events: tuple[ev.Event, ...]


class AgentActor(Actor):
    """One agent. Its stream is its state; `services` of the node give it the model client and local tools."""

    kind: ClassVar[str] = "agent"
    keeps_state: ClassVar[bool] = True
    accepts: ClassVar[tuple[type[msgspec.Struct], ...]] = (
        StartAgent,
        SubAgentEnded,
        CancelAgent,
        AgentStatus,
    )

    state: AgentState | None

    # ---- state --------------------------------------------------------------------------------------------

    def __init__(self, node: Node, address: str) -> None:
        super().__init__(node, address)
        self._start: Inbound | None = None
        self._tools: dict[str, Tool] = {}
        self._cancelled = False
        self._refused = False
        self._run_ended = False

    async def recover(self) -> None:
        """As every actor; but the spec that the fold needs is fetched when AgentStarted names it."""
        while True:
            async for recorded in self.node.log.read(self.address, after=self.version):
                if isinstance(recorded.event, ev.AgentStarted):
                    self._use(await load_stored_spec(self.node.log, recorded.event.spec))
                self.state = self.evolve(self.state, recorded.event)
                self.version = recorded.version
            try:
                await self.record(ev.ActorActivated(node=self.node.id))
                return
            except VersionConflict:
                continue

    def evolve(self, state: AgentState | None, event: ev.Event) -> AgentState | None:
        # Before AgentStarted there is no spec to decide with; what comes before it only counts as versions.
        if state is None:
            self._cancelled = self._cancelled or isinstance(event, ev.AgentCancelled)
            self._refused = self._refused or isinstance(event, ev.AgentCancelled | ev.AgentFailed)
            self._run_ended = self._run_ended or isinstance(event, ev.RunFinished)
            return None
        return evolve(state, event)

    @property
    def meta(self) -> Meta:
        parent = self.state.parent if self.state else ""
        return Meta(node=self.node.id, parent=parent, correlation=run_of(self.address))

    def _use(self, spec: AgentSpec) -> None:
        """Begin folding with this spec."""
        self.state = AgentState(self.address, spec, version=self.version)

    def _load_tools(self, spec: AgentSpec) -> None:
        """Raises NexactorError if a tool does not import on this node."""
        local: dict[str, Tool] = self.node.services.get("tools", {})
        for entry in spec.tools:
            beside = Path(entry.beside) if entry.beside else None
            self._tools[entry.spec.name] = local.get(entry.binding) or load_tool(entry.binding, beside=beside)

    # ---- messages -----------------------------------------------------------------------------------------

    async def on_activated(self) -> None:
        """Take up what was in flight when the former owner died, then whatever is to be decided."""
        if self.state is None or self.state.ended:
            return
        try:
            self._load_tools(self.state.spec)
        except NexactorError as error:
            await self._fail(str(error))
            return
        # An end that the log could not take a moment ago still waits in the mailbox: that effect is done.
        queued = {m.effect_id for m in self.node.waiting(self.address) if isinstance(m, _Ended)}
        for pending in self.state.pending.values():
            if pending.effect_id not in queued:
                self.spawn(self._resume(pending))
        await self._step()

    async def receive_command(self, message: Any, inbound: Inbound) -> None:
        match message:
            case StartAgent():
                self._start = inbound
                if self.state is None:
                    await self._begin(message, inbound)
                await self._wind_up()
            case SubAgentEnded():
                if self.state and message.effect_id in self.state.pending:
                    p = self.state.pending[message.effect_id]
                    await self._step(
                        ev.SubAgentFinished(
                            effect_id=p.effect_id,
                            tool_call_id=p.tool_call_id,
                            name=p.name,
                            child=p.child,
                            status=message.status,
                            result=message.result,
                        )
                    )
                await self.done_with(inbound)
                await self._wind_up()
            case CancelAgent():
                await self._cancel(message.reason)
                await self.done_with(inbound)
                await self._wind_up()

    async def receive(self, message: Any) -> Any:
        match message:
            case _Ended():
                if self.state and message.effect_id in self.state.pending:
                    await self._step(*message.events)
                    await self._wind_up()
            case ev.ReasoningStep():
                if self.state and message.call_id in self.state.pending:
                    await self._step(message)
            case AgentStatus():
                s = self.state
                status = {
                    "version": self.version,
                    "status": s.status if s else "new",
                    "iterations": s.iterations if s else 0,
                    "pending": list(s.pending) if s else [],
                }
                if s is None or s.ended:
                    self.stop()  # Looking does not keep it here.
                return status
        return None

    async def on_given_up(self, error: str) -> None:
        """The run must end rather than hang: record that it failed, for a reason that is not the policy's."""
        if self.state is not None and not self.state.ended:
            await self._fail(error)
        for inbound in await self.node.transport.pending(self.address, 0):
            if inbound.command.type == StartAgent.__name__:
                self._start = inbound
                if self.state is None:
                    start = msgspec.msgpack.decode(inbound.command.body, type=StartAgent)
                    await self._refuse(start, "failed", error)
        await self._wind_up()

    async def _refuse(self, start: StartAgent, status: str, reason: str) -> None:
        """End an agent that never began: its spec cannot be used, or it was cancelled before its start came."""
        events: list[ev.Event] = []
        if not self._refused:
            cancelled = status == "cancelled"
            events.append(
                ev.AgentCancelled(reason=reason) if cancelled else ev.AgentFailed(error=reason, infra=True)
            )
        if not start.parent and not self._run_ended:
            events.append(ev.RunStarted(task=start.input, spec=start.spec, agent="", labels=start.labels))
            events.append(ev.RunFinished(status=status, result=reason))
        if events:
            await self.record(*events)
        if start.parent:
            await self._tell_parent(start.parent, start.parent_effect, status, reason)
        if self._start is not None:
            await self.done_with(self._start)
        self.stop()

    # ---- steps --------------------------------------------------------------------------------------------

    async def _begin(self, start: StartAgent, inbound: Inbound) -> None:
        if self._refused:
            await self._refuse(
                start, "cancelled" if self._cancelled else "failed", "it was ended before it began"
            )
            return
        spec = await load_stored_spec(self.node.log, start.spec)
        self._use(spec)
        received = ev.MessageReceived(
            message_id=inbound.command.id, kind="StartAgent", sender=inbound.command.sender
        )
        run = (
            ()
            if start.parent
            else (ev.RunStarted(task=start.input, spec=start.spec, agent=spec.name, labels=start.labels),)
        )
        began = ev.AgentStarted(
            name=spec.name,
            spec=start.spec,
            input=start.input,
            parent=start.parent,
            parent_effect=start.parent_effect,
            depth=start.depth,
            context=start.context,
        )
        try:
            self._load_tools(spec)
        except NexactorError as error:
            await self.record(received, *run, began, *self._failure(str(error), root=not start.parent))
            return
        await self._step(received, *run, began)

    async def _step(self, *events: ev.Event) -> None:
        """Append these events with the start of what they make the agent do, then do it."""
        assert self.state is not None
        all_events, effects = advance(self.state, events)
        if not all_events:
            return
        await self.record(*all_events)
        for effect in effects:
            if not isinstance(effect, Finish | Fail):
                self.spawn(self._perform(effect))

    async def _wind_up(self) -> None:
        """Once ended: tell the parent, take the start command out of the inbox, end the activation."""
        state = self.state
        if state is None or not state.ended:
            return
        for task in self._tasks:
            task.cancel()
        if state.parent:
            result = state.answer if state.status == "finished" else state.error
            await self._tell_parent(state.parent, state.parent_effect, state.status, result or "")
        if self._start is not None:
            await self.done_with(self._start)
        self.stop()

    async def _tell_parent(self, parent: str, effect_id: str, status: str, result: str) -> None:
        await self.node.command(parent, SubAgentEnded(effect_id, status, result), id=f"{self.address}#ended")

    def _failure(self, error: str, *, root: bool) -> tuple[ev.Event, ...]:
        end = (ev.RunFinished(status="failed", result=error),) if root else ()
        return (ev.AgentFailed(error=error, infra=True), *end)

    async def _fail(self, error: str) -> None:
        assert self.state is not None
        await self._cancel_children("its parent failed")
        await self.record(*self._failure(error, root=not self.state.parent))

    async def _cancel(self, reason: str) -> None:
        if self.state is None:
            # Its start may still be on the way: the event is the mark that will refuse it.
            await self.record(ev.AgentCancelled(reason=reason))
            self.stop()
            return
        if self.state.ended:
            return
        await self._cancel_children(reason)
        end = () if self.state.parent else (ev.RunFinished(status="cancelled", result=reason),)
        await self.record(ev.AgentCancelled(reason=reason), *end)

    async def _cancel_children(self, reason: str) -> None:
        """Before the own end is recorded: after a crash in between, the end is found missing and all this repeats."""
        assert self.state is not None
        for pending in self.state.pending.values():
            if pending.child:
                await self.node.command(pending.child, CancelAgent(reason), id=f"{pending.child}#cancel")

    # ---- effects ------------------------------------------------------------------------------------------

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case CallModel():
                await self._call_model(effect.effect_id)
            case CallTool():
                c = effect.call
                await self._call_tool(effect.effect_id, c.id, c.name, c.arguments)
            case CallAgent():
                await self._call_agent(effect.effect_id, effect.child, effect.spec, effect.input)

    async def _resume(self, pending: Pending) -> None:
        """An effect that the former owner started and did not end."""
        match pending.kind:
            case "model":
                await self._call_model(pending.effect_id, before=1)
            case "agent":
                assert self.state is not None
                spec = next(s.spec for s in self.state.spec.sub_agents if s.name == pending.name)
                await self._call_agent(pending.effect_id, pending.child, spec, pending.arguments)
            case "tool" if pending.repeat in ("safe", "idempotent"):
                await self._call_tool(
                    pending.effect_id, pending.tool_call_id, pending.name, pending.arguments, attempts=2
                )
            case "tool":
                self._end(
                    pending.effect_id,
                    ev.ToolCallFailed(
                        effect_id=pending.effect_id,
                        tool_call_id=pending.tool_call_id,
                        name=pending.name,
                        error="outcome unknown: the process died while the tool ran. It may or may not have taken "
                        "effect; check before you call it again",
                        outcome_unknown=True,
                    ),
                )

    def _end(self, effect_id: str, *events: ev.Event) -> None:
        self.post(_Ended(effect_id, events))

    async def _call_model(self, call_id: str, before: int = 0) -> None:
        """`before` counts the requests that a former owner is known to have begun for this call."""
        assert self.state is not None
        state = self.state
        client: ModelClient = self.node.services["model"]
        chunks = 0

        async def on_reasoning(text: str) -> None:
            nonlocal chunks
            self.post(ev.ReasoningStep(call_id=call_id, index=chunks, text=text))
            chunks += 1

        began = time.monotonic_ns()
        try:
            answer = await client.call(
                state.spec.llm,
                render(state),
                state.spec.tool_specs,
                call_id=call_id,
                previous_call_id=state.last_call,
                previous_tokens=state.tokens,
                on_reasoning=on_reasoning,
            )
        except ModelError as error:
            self._end(
                call_id,
                ev.ModelCallFailed(
                    call_id=call_id, error=str(error), attempts=before + error.attempts, infra=error.infra
                ),
            )
            return
        reasoning = answer.message.reasoning
        steps = (
            (ev.ReasoningStep(call_id=call_id, index=0, text=reasoning),) if reasoning and not chunks else ()
        )
        self._end(
            call_id,
            *steps,
            ev.ModelCallFinished(
                call_id=call_id,
                message=answer.message,
                finish_reason=answer.finish_reason,
                usage=answer.usage,
                model=answer.model,
                policy_version=answer.policy_version,
                tokens=answer.tokens,
                attempts=before + answer.attempts,
                reattached=answer.reattached,
                duration_ns=time.monotonic_ns() - began,
            ),
        )

    async def _call_tool(
        self, effect_id: str, tool_call_id: str, name: str, arguments: str, attempts: int = 1
    ) -> None:
        assert self.state is not None
        workspace = self.state.context.get("workspace")
        context = ToolContext(
            effect_id=effect_id,
            run=run_of(self.address),
            agent=self.address,
            workspace=Path(workspace) if workspace else None,
        )
        began = time.monotonic_ns()
        event: ev.Event
        try:
            result = await self._tool(name).run(arguments, context)
        except ToolError as error:
            event = ev.ToolCallFailed(
                effect_id=effect_id,
                tool_call_id=tool_call_id,
                name=name,
                error=str(error),
                attempts=attempts,
                duration_ns=time.monotonic_ns() - began,
            )
        else:
            event = ev.ToolCallFinished(
                effect_id=effect_id,
                tool_call_id=tool_call_id,
                name=name,
                result=result.text,
                truncated=result.truncated,
                attempts=attempts,
                duration_ns=time.monotonic_ns() - began,
            )
        self._end(effect_id, event)

    def _tool(self, name: str) -> Tool:
        assert self.state is not None
        tool = self._tools.get(name)
        if tool is not None:
            return tool
        names = [t.name for t in self.state.spec.tool_specs]
        if name in names:
            raise ToolError(f'{name} takes one argument, the text of the task: {{"message": "..."}}')
        raise ToolError(f"there is no tool {name!r}; the tools are: {', '.join(names) or 'none'}")

    async def _call_agent(self, effect_id: str, child: str, spec: str, text: str) -> None:
        assert self.state is not None
        local: dict[str, Tool] = self.node.services.get("tools", {})
        if local and any(t.binding in local for t in (await load_stored_spec(self.node.log, spec)).tools):
            # Tools that live only in this process (a notebook's functions, say) bind the child to it.
            await self.node.transport.place(child, self.node.id, instead_of=None)
        await self.node.command(
            child,
            StartAgent(
                spec=spec,
                input=text,
                parent=self.address,
                parent_effect=effect_id,
                depth=self.state.depth + 1,
                context=self.state.context,
            ),
            id=f"{child}#start",
            avoid=self.node.id,
        )
