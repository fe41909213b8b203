"""One active actor on a node: its mailbox, its loop, and its supervision by restart."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from nexactor.actor import Actor, Delivery
from nexactor.events.errors import LogUnavailable, VersionConflict
from nexactor.wire import ActorFailed, BadMessage, MailboxFull, decode_message

if TYPE_CHECKING:
    from nexactor.node import Node

log = logging.getLogger("nexactor.actors")

MAX_RESTARTS = 5
BACKOFF_S = 0.05


class Cell:
    """Runs activations of one actor until it stops, is fenced, or restarts no longer help."""

    def __init__(self, node: Node, address: str, cls: type[Actor]) -> None:
        self.node, self.address, self.cls = node, address, cls
        self.actor: Actor | None = None
        self.wake = asyncio.Event()
        self.fenced = False
        self.closed = False
        self._served = 0
        self._mailbox: deque[Delivery] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._space: deque[asyncio.Future[None]] = deque()

    # ---- mailbox ------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        return len(self._mailbox) >= self.cls.mailbox_size

    def put(self, delivery: Delivery) -> None:
        """Enqueue past the bound check (the caller made it)."""
        self._mailbox.append(delivery)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def offer(self, delivery: Delivery) -> None:
        """Enqueue, or raise MailboxFull."""
        if self.full:
            raise MailboxFull(
                f"the mailbox of {self.address} is full ({self.cls.mailbox_size} messages); try again later"
            )
        self.put(delivery)

    async def put_waiting(self, delivery: Delivery) -> bool:
        """Enqueue, waiting while the mailbox is full. False if the cell ended in the meantime."""
        while self.full and not self.closed:
            space: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._space.append(space)
            try:
                await space
            except asyncio.CancelledError:
                if not space.cancelled():
                    self._wake_sender()  # The room was offered to a sender that left: it is the next one's.
                raise
        if self.closed:
            return False
        self.put(delivery)
        return True

    def waiting(self) -> list[Any]:
        """The messages in the mailbox, oldest first."""
        return [d.message for d in self._mailbox]

    async def _next(self) -> Delivery:
        while not self._mailbox:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        delivery = self._mailbox.popleft()
        self._wake_sender()
        return delivery

    def _wake_sender(self) -> None:
        while self._space:
            space = self._space.popleft()
            if not space.done():
                space.set_result(None)
                return

    # ---- life ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Activate, serve, and restart after failures; returns when this activation is over for good."""
        failures = 0
        try:
            while True:
                self._served = 0
                try:
                    await self._activate()
                    if not self._mailbox:
                        return
                except ExceptionGroup as group:
                    task = asyncio.current_task()
                    if task is not None and task.cancelling():
                        # The node is stopping; what an actor's task raised on its way out must not hide that.
                        raise asyncio.CancelledError from group
                    if (conflict := group.subgroup(VersionConflict)) is not None:
                        log.warning("%s left this node: %s", self.address, _text(conflict))
                        self.fenced = True
                        return
                    if group.subgroup(LogUnavailable) is not None:
                        log.warning("%s waits for the log: %s", self.address, _text(group))
                        await asyncio.sleep(1.0)
                        continue
                    failures = 1 if self._served > 100 else failures + 1
                    log.error("%s failed (%d): %s", self.address, failures, _text(group), exc_info=group)
                    if failures > MAX_RESTARTS:
                        await self._give_up(_text(group))
                        return
                    await asyncio.sleep(BACKOFF_S * 2**failures)
        finally:
            self._fail_waiting()

    async def _activate(self) -> None:
        """One activation: recover the state, take messages until the actor stops itself."""
        async with asyncio.TaskGroup() as scope:
            actor = self.actor = self.cls(self.node, self.address)
            actor._scope = scope
            await actor.recover()
            await actor.on_activated()
            pump = scope.create_task(self._pump(actor)) if self.cls.keeps_state else None
            while not actor._stopping:
                delivery = await self._next()
                try:
                    await self._handle(actor, delivery)
                except LogUnavailable:
                    if delivery.answer is None and delivery.inbound is None:
                        self._mailbox.appendleft(
                            delivery
                        )  # The actor's own word, an effect's end say: keep it.
                    raise
                self._served += 1
            # Whatever the actor spawned ends with it: no task outlives its scope.
            for task in list(actor._tasks):
                task.cancel()
            if pump is not None:
                pump.cancel()

    async def _handle(self, actor: Actor, delivery: Delivery) -> None:
        loop = asyncio.get_running_loop()
        answer = delivery.answer
        if delivery.deadline and loop.time() > delivery.deadline:
            return  # Nobody waits any more: work for an expired ask would only delay the others.
        if delivery.inbound is not None:
            command = delivery.inbound.command
            try:
                message = decode_message(self.cls.accepts, command.type, command.body)
            except BadMessage as error:
                log.error("command %s to %s is set aside: %s", command.id, self.address, error)
                await actor.done_with(delivery.inbound)
                return
            await actor.receive_command(message, delivery.inbound)
            return
        try:
            result = await actor.receive(delivery.message)
        except Exception as error:
            if answer is not None and not answer.done():
                answer.set_exception(ActorFailed(f"{self.address}: {type(error).__name__}: {error}"))
            raise
        if answer is not None and not answer.done():
            answer.set_result(result)

    async def _pump(self, actor: Actor) -> None:
        """Move commands from the durable inbox into the mailbox, oldest first."""
        after = 0
        while True:
            self.wake.clear()
            for inbound in await self.node.transport.pending(self.address, after):
                after = inbound.sequence
                await self.put_waiting(Delivery(None, inbound=inbound))
            await self.wake.wait()

    async def _give_up(self, error: str) -> None:
        actor = self.cls(self.node, self.address)
        try:
            await actor.recover()
            await actor.on_given_up(error)
        except Exception as last:
            log.error("%s could not record its failure: %s", self.address, last)

    def _fail_waiting(self) -> None:
        self.closed = True
        for space in self._space:
            if not space.done():
                space.set_result(None)
        for delivery in self._mailbox:
            if delivery.answer is not None and not delivery.answer.done():
                delivery.answer.set_exception(ActorFailed(f"{self.address} stopped before it answered"))
        self._mailbox.clear()


def _text(error: BaseException) -> str:
    """The first real error of a group, as one line."""
    e: Any = error
    while isinstance(e, BaseExceptionGroup):
        e = e.exceptions[0]
    return f"{type(e).__name__}: {e}"
