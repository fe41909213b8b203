"""A node: one process that hosts actors, activates them on their first message, and takes over from the dead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterable, Mapping
from types import TracebackType
from typing import Any

import msgspec

from nexactor.actor import Actor, ActorRef, Delivery
from nexactor.cell import Cell
from nexactor.events.errors import NexactorError
from nexactor.events.ids import check_address, kind_of, new_id
from nexactor.events.log import EventLog
from nexactor.transport import NodeInfo, Transport, choose_node
from nexactor.wire import (
    ActorFailed,
    AskTimeout,
    BadMessage,
    Command,
    Letter,
    MailboxFull,
    Reply,
    decode_letter,
    decode_message,
    decode_reply,
    decode_value,
    encode,
)

log = logging.getLogger("nexactor.node")

SWEEP_S = 1.0
ROLL_CALL_S = 1.0
"""How long after joining a node may still not have heard of all others."""
_MOVED = "Moved"
"""The reply of a node that does not host the actor any more: the sender looks it up again."""
_ERRORS: dict[str, type[NexactorError]] = {
    c.__name__: c for c in (ActorFailed, AskTimeout, BadMessage, MailboxFull)
}


class Node:
    """Hosts actors of the given classes. Use as an async context manager; leaving it stops every actor.

    A node without actor classes is a client: it can send to actors, but hosts none.
    """

    def __init__(
        self,
        log: EventLog,
        transport: Transport,
        *,
        actors: Iterable[type[Actor]] = (),
        name: str = "node",
        labels: Mapping[str, str] | None = None,
        services: Mapping[str, Any] | None = None,
    ) -> None:
        self.log = log
        self.transport = transport
        self.id = f"{name}-{new_id()[-12:]}"
        self.classes = {cls.kind: cls for cls in actors}
        self.labels = dict(labels or {})
        self.services: Mapping[str, Any] = services or {}
        self._cells: dict[str, Cell] = {}
        self._stations: dict[str, str] = {}
        self._scope: asyncio.TaskGroup
        self._known_by = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> NodeInfo:
        return NodeInfo(self.id, tuple(self.classes), self.labels, len(self._cells))

    async def __aenter__(self) -> Node:
        self._scope = await asyncio.TaskGroup().__aenter__()
        try:
            self._known_by = asyncio.get_running_loop().time() + ROLL_CALL_S
            await self.transport.join(self.info, self._on_ask, self._on_tell, self._on_wake)
        except BaseException as error:
            await self._scope.__aexit__(type(error), error, error.__traceback__)
            raise
        if self.classes:
            self._start(self._sweep_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.transport.leave()
        finally:
            for task in self._tasks:
                task.cancel()
        # The body's own error, if any, goes on by itself rather than inside an exception group.
        await self._scope.__aexit__(None, None, None)

    def _start(self, work: Any) -> None:
        task = self._scope.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- sending ------------------------------------------------------------------------------------------

    def ref(self, address: str) -> ActorRef:
        """A handle to any actor, here or elsewhere, active or not."""
        return ActorRef(check_address(address), self)

    async def tell(self, address: str, message: msgspec.Struct) -> None:
        """See ActorRef.tell."""
        where = await self.locate(address)
        if where == self.id:
            while not await self._cell(address).put_waiting(Delivery(message)):
                pass  # That activation ended while we waited for room: the next one takes it.
        else:
            await self.transport.tell(where, encode(Letter(address, type(message).__name__, encode(message))))

    async def ask(
        self, address: str, message: msgspec.Struct, *, timeout: float, reply: type | None = None
    ) -> Any:
        """See ActorRef.ask."""
        letter = Letter(address, type(message).__name__, encode(message), deadline=time.time() + timeout)
        while True:
            where = await self.locate(address)
            if where == self.id:
                return await self._put_ask(self._cell(address), message, timeout)
            left = letter.deadline - time.time()
            if left <= 0:
                raise AskTimeout(f"{address} did not answer within {timeout:g} s")
            answer = decode_reply(await self.transport.ask(where, encode(letter), left))
            if answer.ok:
                return decode_value(answer.body, reply)
            if answer.type != _MOVED:
                raise _ERRORS.get(answer.type, ActorFailed)(decode_value(answer.body, str))
            self._stations.pop(address, None)

    async def command(self, address: str, message: msgspec.Struct, *, id: str, avoid: str = "") -> None:
        """See ActorRef.command. `avoid` names a node that a new actor should not land on if another can take it."""
        await self.transport.put(Command(id, address, type(message).__name__, encode(message), self.id))
        try:
            where = await self.locate(address, avoid=avoid)
        except NexactorError as error:
            # The command is durable: the first node that can host the actor finds it in its sweep.
            log.warning("%s waits in the inbox: %s", address, error)
            return
        if where == self.id:
            self._cell(address).wake.set()
        else:
            await self.transport.wake(where, address)

    def post(self, address: str, actor: Actor, message: Any) -> None:
        """An actor's message to itself; dropped when that activation is over."""
        cell = self._cells.get(address)
        if cell is not None and cell.actor is actor:
            cell.put(Delivery(message))

    async def locate(self, address: str, *, avoid: str = "") -> str:
        """The live node that hosts an actor, placing it if it is nowhere. Raises NexactorError if none can."""
        if address in self._cells:
            return self.id
        live = self.transport.live()
        known = self._stations.get(address)
        if known in live:
            return known
        placed = await self.transport.place_of(address)
        if placed is None or placed not in live:
            kind = kind_of(address)
            chosen = choose_node(address, live.values(), kind, avoid)
            while chosen is None and asyncio.get_running_loop().time() < self._known_by:
                # Just joined: the others' answers to the roll call are still on their way.
                await asyncio.sleep(0.01)
                live = self.transport.live()
                chosen = choose_node(address, live.values(), kind, avoid)
            if chosen is None:
                raise NexactorError(
                    f"no live node hosts actors of kind {kind!r}: start one with `nexactor node`"
                )
            placed = await self.transport.place(address, chosen, instead_of=placed)
        if len(self._stations) > 10_000:
            self._stations.clear()
        self._stations[address] = placed
        return placed

    def _put_ask(self, cell: Cell, message: Any, timeout: float) -> Awaitable[Any]:
        """Into the mailbox now; what is returned gives the answer, or AskTimeout."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        cell.offer(Delivery(message, answer, loop.time() + timeout))
        timer = loop.call_later(timeout, _expire, answer, cell.address, timeout)
        answer.add_done_callback(lambda _: timer.cancel())
        return answer

    # ---- hosting ------------------------------------------------------------------------------------------

    def _cell(self, address: str) -> Cell:
        cell = self._cells.get(address)
        if cell is None:
            cls = self.classes.get(kind_of(address))
            if cls is None:
                raise NexactorError(f"this node hosts no actors of kind {kind_of(address)!r}")
            cell = self._cells[address] = Cell(self, address, cls)
            self._start(self._host(cell))
            self.transport.update(self.info)
        return cell

    async def _host(self, cell: Cell) -> None:
        try:
            await cell.run()
        finally:
            del self._cells[cell.address]
            self._stations.pop(cell.address, None)
            self.transport.update(self.info)
        if not cell.fenced:
            try:
                await self.transport.unplace(cell.address)
            except NexactorError as error:
                log.warning("%s stays placed here: %s", cell.address, error)

    async def _on_ask(self, data: bytes) -> Awaitable[bytes]:
        try:
            letter = decode_letter(data)
            left = letter.deadline - time.time() if letter.deadline else 60.0
            if await self._elsewhere(letter.to):
                return _reply(Reply(False, _MOVED, encode("")))
            cell = self._cell(letter.to)
            answer = self._put_ask(cell, decode_message(cell.cls.accepts, letter.type, letter.body), left)
        except NexactorError as error:
            return _reply(Reply(False, type(error).__name__, encode(str(error))))
        return _answered(answer)

    async def _on_tell(self, data: bytes) -> None:
        try:
            letter = decode_letter(data)
            if where := await self._elsewhere(letter.to):
                await self.transport.tell(where, data)
                return
            cell = self._cell(letter.to)
            cell.offer(Delivery(decode_message(cell.cls.accepts, letter.type, letter.body)))
        except NexactorError as error:
            log.warning("a message was not delivered: %s", error)

    async def _on_wake(self, address: str) -> None:
        try:
            if where := await self._elsewhere(check_address(address)):
                await self.transport.wake(where, address)
                return
            self._cell(address).wake.set()
        except NexactorError as error:
            log.warning("a wake-up was refused: %s", error)

    async def _elsewhere(self, address: str) -> str:
        """The node that an actor is on, if not this one: a sender may know an old place, and activating the actor
        here would fence its true owner in the middle of its work."""
        if address in self._cells:
            return ""
        self._stations.pop(address, None)
        where = await self.locate(address)
        return "" if where == self.id else where

    def waiting(self, address: str) -> list[Any]:
        """What waits in the mailbox of an actor that is active here."""
        cell = self._cells.get(address)
        return cell.waiting() if cell is not None else []

    # ---- taking over --------------------------------------------------------------------------------------

    async def _sweep_for_ever(self) -> None:
        """An actor with a command in its inbox must be active somewhere: see to those that are not."""
        while True:
            try:
                await self._sweep()
            except NexactorError as error:
                log.warning("the inboxes cannot be read now: %s", error)
            await asyncio.sleep(SWEEP_S)

    async def _sweep(self) -> None:
        for address in await self.transport.addresses_pending():
            cell = self._cells.get(address)
            if cell is not None:
                cell.wake.set()  # A wake-up may have been lost with a connection.
            elif kind_of(address) in self.classes and await self.locate(address) == self.id:
                self._cell(address).wake.set()


async def _reply(reply: Reply) -> bytes:
    return encode(reply)


async def _answered(answer: Awaitable[Any]) -> bytes:
    try:
        return encode(Reply(True, "", encode(await answer)))
    except NexactorError as error:
        return encode(Reply(False, type(error).__name__, encode(str(error))))


def _expire(answer: asyncio.Future[Any], address: str, timeout: float) -> None:
    if not answer.done():
        answer.set_exception(AskTimeout(f"{address} did not answer within {timeout:g} s"))
