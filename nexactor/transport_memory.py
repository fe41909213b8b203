"""An in-memory network of nodes in one process, for tests and simulation. Same bytes as over NATS; a repeated
command id is recognised for ever, not for two minutes only."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from nexactor.transport import AskHandler, Inbound, NodeInfo, TellHandler, WakeHandler
from nexactor.wire import AskTimeout, Command


class _Station(NamedTuple):
    info: NodeInfo
    ask: AskHandler
    tell: TellHandler
    wake: WakeHandler


class MemoryNetwork:
    """What the transports of one simulated cluster share. `crash` makes a node vanish without a goodbye."""

    def __init__(self) -> None:
        self.stations: dict[str, _Station] = {}
        self.inbox: dict[int, Command] = {}
        self.known: set[str] = set()
        self.places: dict[str, str] = {}
        self.sequence = 0

    def crash(self, node: str) -> None:
        """Cut a node off: it neither sends nor receives from now on."""
        self.stations.pop(node, None)

    def transport(self) -> MemoryTransport:
        """A transport for one more node."""
        return MemoryTransport(self)


class MemoryTransport:
    """`Transport` over a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._net = network
        self._id = ""

    async def join(self, info: NodeInfo, ask: AskHandler, tell: TellHandler, wake: WakeHandler) -> None:
        self._id = info.id
        self._net.stations[info.id] = _Station(info, ask, tell, wake)

    async def leave(self) -> None:
        self._net.stations.pop(self._id, None)

    def update(self, info: NodeInfo) -> None:
        station = self._net.stations.get(self._id)
        if station is not None:
            self._net.stations[self._id] = station._replace(info=info)

    def live(self) -> dict[str, NodeInfo]:
        return {k: s.info for k, s in self._net.stations.items()}

    async def ask(self, node: str, letter: bytes, timeout: float) -> bytes:
        station = self._net.stations.get(node)
        if station is None:
            raise AskTimeout(f"node {node} is gone")
        try:
            async with asyncio.timeout(timeout):
                return await (await station.ask(letter))
        except TimeoutError:
            raise AskTimeout(f"no reply from node {node} within {timeout:g} s") from None

    async def tell(self, node: str, letter: bytes) -> None:
        station = self._net.stations.get(node)
        if station is not None:
            await station.tell(letter)

    async def wake(self, node: str, address: str) -> None:
        station = self._net.stations.get(node)
        if station is not None:
            await station.wake(address)

    async def put(self, command: Command) -> None:
        if command.id not in self._net.known:
            self._net.known.add(command.id)
            self._net.sequence += 1
            self._net.inbox[self._net.sequence] = command

    async def pending(self, address: str, after: int) -> list[Inbound]:
        return [Inbound(s, c) for s, c in self._net.inbox.items() if c.to == address and s > after]

    async def remove(self, sequence: int) -> None:
        self._net.inbox.pop(sequence, None)

    async def addresses_pending(self) -> list[str]:
        return list(dict.fromkeys(c.to for c in self._net.inbox.values()))

    async def place_of(self, address: str) -> str | None:
        return self._net.places.get(address)

    async def place(self, address: str, node: str, *, instead_of: str | None) -> str:
        if self._net.places.get(address) == instead_of:
            self._net.places[address] = node
        return self._net.places[address]

    async def unplace(self, address: str) -> None:
        if self._net.places.get(address) == self._id:
            del self._net.places[address]
