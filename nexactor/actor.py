"""Actors: addressable units of state with a mailbox, handled one message at a time.

Subclass `Actor`, say which messages it `accepts`, write `receive`. An actor that keeps its state in the log also
writes `initial` and `evolve`; what it `record`s is durable before anything depends on it, and after a crash its
next owner folds the same events to the same state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from nexactor.events.errors import VersionConflict
from nexactor.events.log import Meta
from nexactor.events.types import ActorActivated, Event
from nexactor.transport import Inbound

if TYPE_CHECKING:
    from nexactor.events.envelope import Recorded
    from nexactor.node import Node


class ActorRef(msgspec.Struct, frozen=True):
    """A handle to an actor, wherever it lives and whether or not it is active now."""

    address: str
    node: Any

    async def tell(self, message: msgspec.Struct) -> None:
        """Send without waiting for the handling. Waits while a local mailbox is full (back-pressure)."""
        await self.node.tell(self.address, message)

    async def ask(self, message: msgspec.Struct, *, timeout: float = 5.0, reply: type | None = None) -> Any:
        """Send and wait for what `receive` returns, at most `timeout` seconds.

        The deadline travels with the message. `reply` is the type to decode a remote reply into (None: builtins).
        Raises AskTimeout, MailboxFull, BadMessage or ActorFailed.
        """
        return await self.node.ask(self.address, message, timeout=timeout, reply=reply)

    async def command(self, message: msgspec.Struct, *, id: str) -> None:
        """Put a message in the actor's durable inbox: it will be handled, even if every process dies now.

        At least once on the wire; `id` lets the actor recognise a repetition.
        """
        await self.node.command(self.address, message, id=id)


class Actor:
    """Base class. One instance is one activation; the node creates it on the first message."""

    kind: ClassVar[str]
    accepts: ClassVar[tuple[type[msgspec.Struct], ...]] = ()
    mailbox_size: ClassVar[int] = 1000
    keeps_state: ClassVar[bool] = False
    """Whether the actor has a stream in the log (then activation appends ActorActivated, the fence)."""

    def __init__(self, node: Node, address: str) -> None:
        self.node = node
        self.address = address
        self.version = 0
        self.state: Any = None
        self._scope: asyncio.TaskGroup | None = None
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- to override --------------------------------------------------------------------------------------

    def initial(self) -> Any:
        """The state before the first event."""
        return None

    def evolve(self, state: Any, event: Event) -> Any:
        """Fold one event into the state. Pure: no clock, no randomness, no I/O."""
        return state

    async def receive(self, message: Any) -> Any:
        """Handle one message; what it returns answers an ask."""
        raise TypeError(f"{type(self).__name__} handles no messages")

    async def receive_command(self, message: Any, inbound: Inbound) -> None:
        """Handle one durable command. An override takes it out of the inbox (`done_with`) when its work is done;
        until then it comes again at every activation, so handling must recognise what was done before."""
        await self.receive(message)
        await self.done_with(inbound)

    async def on_activated(self) -> None:
        """Called once the state is recovered, before the first message."""

    async def on_given_up(self, error: str) -> None:
        """Called when restarts did not help; the last chance to record why. The activation ends after it."""

    # ---- to use -------------------------------------------------------------------------------------------

    @property
    def meta(self) -> Meta:
        """What goes into the envelopes of this actor's events."""
        return Meta(node=self.node.id)

    async def record(self, *events: Event) -> tuple[Recorded, ...]:
        """Append one step's events and fold them. When this returns they are durable.

        Raises VersionConflict when another node owns the actor by now: this activation is over.
        """
        recorded = await self.node.log.append(
            self.address, events, expected_version=self.version, meta=self.meta
        )
        for event in events:
            self.state = self.evolve(self.state, event)
        self.version += len(events)
        return recorded

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work beside the mailbox, within this activation: it is cancelled when the actor stops."""
        assert self._scope is not None, "spawn only from receive or on_activated"
        task = self._scope.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def post(self, message: Any) -> None:
        """Put a message of this actor's own into its mailbox, past the bound (its own work is bounded already)."""
        self.node.post(self.address, self, message)

    def stop(self) -> None:
        """End this activation after the current message; the next message activates the actor anew."""
        self._stopping = True

    async def done_with(self, inbound: Inbound) -> None:
        """Take a command out of the inbox: all its consequences are durable."""
        await self.node.transport.remove(inbound.sequence)

    async def recover(self) -> None:
        """Fold the stream and take ownership of it. Called by the node."""
        self.state = self.initial()
        if not self.keeps_state:
            return
        while True:
            async for recorded in self.node.log.read(self.address, after=self.version):
                self.state = self.evolve(self.state, recorded.event)
                self.version = recorded.version
            try:
                await self.record(ActorActivated(node=self.node.id))
                return
            except VersionConflict:
                # Somebody (perhaps the former owner's last append) was quicker: read what came, try again.
                continue


class Delivery(msgspec.Struct):
    """A message in a mailbox: who wants the answer, by when (loop time; 0: no deadline), its place in the inbox."""

    message: Any
    answer: asyncio.Future[Any] | None = None
    deadline: float = 0.0
    inbound: Inbound | None = None
