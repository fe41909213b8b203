"""What a node needs from the network; `transport_nats.py` and `transport_memory.py` give it.

Three kinds of traffic: ephemeral letters between nodes (tell, ask), durable commands in inboxes, and knowledge of
which nodes live and which node hosts which actor. A placement is a hint for routing; the fence against two
owners is the event log's version check, never the placement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import msgspec

from nexactor.wire import Command


class NodeInfo(msgspec.Struct, frozen=True):
    """What a node says of itself in every heartbeat."""

    id: str
    kinds: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    actors: int = 0


class Inbound(msgspec.Struct, frozen=True):
    """A command with its place in the inbox stream; `sequence` removes it when it is dealt with."""

    sequence: int
    command: Command


AskHandler = Callable[[bytes], Awaitable[Awaitable[bytes]]]
"""Takes a letter in (in the order of arrival, tells among them), and gives what to await for its reply."""
TellHandler = Callable[[bytes], Awaitable[None]]
WakeHandler = Callable[[str], Awaitable[None]]


class Transport(Protocol):
    """The network as one node sees it."""

    async def join(self, info: NodeInfo, ask: AskHandler, tell: TellHandler, wake: WakeHandler) -> None:
        """Become reachable and visible (a client joins with no kinds: it hosts nothing)."""
        ...

    async def leave(self) -> None:
        """Say goodbye, so that nobody waits for the heartbeat to go stale."""
        ...

    def update(self, info: NodeInfo) -> None:
        """What the next heartbeats say."""
        ...

    def live(self) -> dict[str, NodeInfo]:
        """The nodes believed alive, this one included."""
        ...

    async def ask(self, node: str, letter: bytes, timeout: float) -> bytes:
        """Deliver a letter to a node and wait for the reply. Raises AskTimeout."""
        ...

    async def tell(self, node: str, letter: bytes) -> None:
        """Deliver a letter to a node, at most once."""
        ...

    async def wake(self, node: str, address: str) -> None:
        """Tell a node that an actor it hosts has something in its inbox (a hint; sweeps catch lost ones)."""
        ...

    async def put(self, command: Command) -> None:
        """Make a command durable in its target's inbox; the same id twice is stored once."""
        ...

    async def pending(self, address: str, after: int) -> list[Inbound]:
        """Commands in one inbox with sequence > `after`, oldest first."""
        ...

    async def remove(self, sequence: int) -> None:
        """Take a command out of its inbox for good: it has been dealt with."""
        ...

    async def addresses_pending(self) -> list[str]:
        """All addresses whose inbox is not empty: the actors that must be active somewhere."""
        ...

    async def place_of(self, address: str) -> str | None:
        """The node that an actor was last placed on."""
        ...

    async def place(self, address: str, node: str, *, instead_of: str | None) -> str:
        """Put an actor on a node if it is still placed as the caller believes; returns where it is now."""
        ...

    async def unplace(self, address: str) -> None:
        """Forget where an actor is (it is passive now)."""
        ...


def choose_node(address: str, nodes: Iterable[NodeInfo], kind: str, avoid: str = "") -> str | None:
    """The node for an actor, by rendezvous hashing over the live nodes that host its kind.

    `avoid` (the parent's node) is left out where another node can take the actor, so that a parent and its
    sub-agents spread over the cluster.
    """
    able = [n.id for n in nodes if kind in n.kinds]
    others = [n for n in able if n != avoid]
    return max(
        others or able, key=lambda n: hashlib.blake2b(f"{n}|{address}".encode()).digest(), default=None
    )
