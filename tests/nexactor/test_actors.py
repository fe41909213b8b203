"""Plain actors: tell, ask, deadlines, bounds, restarts; in memory and across two nodes over NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgspec
import pytest

from nexactor import cell
from nexactor.actor import Actor
from nexactor.events.broker import Broker
from nexactor.events.errors import NexactorError, VersionConflict
from nexactor.events.memory import MemoryLog
from nexactor.events.types import Annotated, Event
from nexactor.node import Node
from nexactor.transport_memory import MemoryNetwork
from nexactor.transport_nats import NatsTransport
from nexactor.wire import ActorFailed, AskTimeout, BadMessage, Letter, MailboxFull, decode_letter, encode


class Add(msgspec.Struct, frozen=True):
    n: int


class Total(msgspec.Struct, frozen=True):
    pass


class Crash(msgspec.Struct, frozen=True):
    pass


class Hang(msgspec.Struct, frozen=True):
    pass


class Foreign(msgspec.Struct, frozen=True):
    pass


class Fence(msgspec.Struct, frozen=True):
    """Wait for the gate, then find out that another node owns the actor."""


gates: list[asyncio.Event] = []


class Counter(Actor):
    """Counts in the log."""

    kind: ClassVar[str] = "counter"
    keeps_state: ClassVar[bool] = True
    accepts: ClassVar[tuple[type[msgspec.Struct], ...]] = (Add, Total, Crash, Hang, Fence)

    def initial(self) -> int:
        return 0

    def evolve(self, state: int, event: Event) -> int:
        return state + int(event.value) if isinstance(event, Annotated) else state

    async def receive(self, message: Any) -> Any:
        match message:
            case Add():
                await self.record(Annotated(run="r", key="add", value=str(message.n)))
            case Total():
                return self.state
            case Crash():
                raise RuntimeError("boom")
            case Hang():
                await asyncio.Event().wait()
            case Fence():
                await gates[-1].wait()
                raise VersionConflict(self.address, 1, 2)
        return None


class Small(Counter):
    kind: ClassVar[str] = "small"
    keeps_state: ClassVar[bool] = False
    mailbox_size: ClassVar[int] = 2


@pytest.fixture(params=["memory", "nats"])
async def pair(
    request: pytest.FixtureRequest, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Node, Node]]:
    """(a node that hosts, a client on another node)."""
    monkeypatch.setattr(cell, "BACKOFF_S", 0.001)
    log = MemoryLog()
    if request.param == "memory":
        network = MemoryNetwork()
        transports: Any = (network.transport(), network.transport())
    else:
        transports = (NatsTransport(broker), NatsTransport(broker))
    async with Node(log, transports[0], actors=(Counter, Small), name="host") as host:
        async with Node(log, transports[1], name="client") as client:
            yield host, client


async def test_ask_from_another_node_gets_the_reply(pair: tuple[Node, Node]) -> None:
    counter = pair[1].ref("counter/r")
    await counter.ask(Add(2))
    await counter.ask(Add(3))
    assert await counter.ask(Total(), reply=int) == 5


async def test_tells_of_one_sender_are_handled_in_order_and_before_its_next_ask(
    pair: tuple[Node, Node],
) -> None:
    for node in pair:
        ref = node.ref(f"counter/{node.id}")
        for n in range(20):
            await ref.tell(Add(n))
        assert await ref.ask(Total()) == sum(range(20))


async def test_a_crashed_actor_is_restarted_with_its_state(pair: tuple[Node, Node]) -> None:
    counter = pair[1].ref("counter/r")
    await counter.ask(Add(7))
    with pytest.raises(ActorFailed, match="boom"):
        await counter.ask(Crash())
    assert await counter.ask(Total()) == 7


async def test_an_ask_ends_at_its_deadline(pair: tuple[Node, Node]) -> None:
    with pytest.raises(AskTimeout):
        await pair[1].ref("counter/r").ask(Hang(), timeout=0.05)


async def test_a_message_the_actor_does_not_accept_is_refused(pair: tuple[Node, Node]) -> None:
    with pytest.raises(BadMessage, match="accepted: Add, Total"):
        await pair[1].ref("counter/r").ask(Foreign())


async def test_an_actor_that_nobody_hosts_is_a_clear_error(pair: tuple[Node, Node]) -> None:
    with pytest.raises(NexactorError, match="no live node hosts actors of kind 'ghost'"):
        await pair[1].ref("ghost/r").ask(Total())


async def test_a_full_mailbox_rejects_an_ask_and_makes_a_local_tell_wait(pair: tuple[Node, Node]) -> None:
    host = pair[0]
    small = host.ref("small/r")
    await small.tell(Hang())
    while host._cells["small/r"]._mailbox:
        await asyncio.sleep(0)
    await small.tell(Total())
    await small.tell(Total())
    with pytest.raises(MailboxFull):
        await small.ask(Total())
    blocked = asyncio.ensure_future(small.tell(Total()))
    await asyncio.sleep(0)
    assert not blocked.done()
    blocked.cancel()


async def test_a_tell_that_waits_for_room_reaches_the_next_activation(pair: tuple[Node, Node]) -> None:
    host = pair[0]
    small = host.ref("small/r")
    gates.append(asyncio.Event())
    await small.tell(Fence())
    first = host._cells["small/r"]
    while first._mailbox:
        await asyncio.sleep(0)
    await small.tell(Total())
    await small.tell(Total())
    blocked = asyncio.ensure_future(small.tell(Add(1)))
    await asyncio.sleep(0)
    assert not blocked.done()
    gates[-1].set()
    await blocked
    assert first.closed
    assert host._cells["small/r"] is not first


async def test_a_command_is_durable_and_taken_once(pair: tuple[Node, Node]) -> None:
    host, client = pair
    counter = client.ref("counter/r")
    await counter.command(Add(5), id="c1")
    await counter.command(Add(5), id="c1")
    while await host.transport.addresses_pending():
        await asyncio.sleep(0)
    assert await counter.ask(Total()) == 5


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x93\x01\x02\x03", encode(Letter("x", "y", b""))[:-2], b"\x00" * 99]
)
def test_bytes_that_are_no_letter_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_letter(data)
