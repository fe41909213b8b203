"""The transport over NATS: core subjects between nodes, JetStream for inboxes and placements.

Subjects, below `nx.<namespace>`: `hb`, `bye`, `who` membership; `node.<id>.letter.ask|tell` letters;
`node.<id>.wake` hints; `inbox.<run>.<kind>.<rest>` durable commands (stream NX-<namespace>-inbox);
`place.<run>.<kind>.<rest>` where an actor is (stream NX-<namespace>-places).
"""

from __future__ import annotations

import asyncio
import base64
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from nexactor.events.errors import LogError
from nexactor.events.ids import escape, unescape
from nexactor.transport import AskHandler, Inbound, NodeInfo, TellHandler, WakeHandler
from nexactor.wire import AskTimeout, BadMessage, Command, decode_command, encode

if TYPE_CHECKING:
    from nexactor.events.broker import Broker

log = logging.getLogger("nexactor.transport")

HEARTBEAT_S = 0.5
DEAD_AFTER_S = 3.0
_NO_MESSAGE = 10037
_WRONG_SEQUENCE = 10071

_info_decoder = msgspec.msgpack.Decoder(NodeInfo)


def _tail(address: str) -> str:
    """`agent/r1/worker` -> `r1.agent.worker`, escaped; the inverse is `_address`."""
    kind, run, *rest = address.split("/", 2)
    return f"{escape(run)}.{escape(kind)}.{escape(rest[0] if rest else '')}"


def _address(tail: str) -> str:
    run, kind, rest = (unescape(t) for t in tail.split("."))
    return f"{kind}/{run}/{rest}" if rest else f"{kind}/{run}"


class NatsTransport:
    """`Transport` over a connected Broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._base = f"nx.{escape(broker.namespace)}"
        self._inbox = f"NX-{escape(broker.namespace)}-inbox"
        self._places = f"NX-{escape(broker.namespace)}-places"
        self._info = NodeInfo("")
        self._seen: dict[str, tuple[NodeInfo, float]] = {}
        self._subscriptions: list[Any] = []
        self._answering: set[asyncio.Task[None]] = set()
        self._beat: asyncio.Task[None] | None = None
        self._was_connected = True

    async def join(self, info: NodeInfo, ask: AskHandler, tell: TellHandler, wake: WakeHandler) -> None:
        await self._create(self._inbox, f"{self._base}.inbox.>", {})
        await self._create(self._places, f"{self._base}.place.>", {"max_msgs_per_subject": 1})
        self._info = info
        nc = self._broker.nc

        async def on_letter(message: Any) -> None:
            # One subscription for tells and asks: what one sender sent first is in the mailbox first.
            if not message.subject.endswith(".ask"):
                await tell(message.data)
                return
            reply = await ask(message.data)

            async def answer() -> None:
                await nc.publish(message.reply, await reply)

            # Replies are awaited beside each other: one slow actor must not hold up the node's other letters.
            task = asyncio.get_running_loop().create_task(answer())
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

        async def on_wake(message: Any) -> None:
            await wake(message.data.decode(errors="replace"))

        async def on_beat(message: Any) -> None:
            self._heard(message.data, gone=False)

        async def on_goodbye(message: Any) -> None:
            self._heard(message.data, gone=True)

        async def on_roll_call(message: Any) -> None:
            await self._announce()

        mine = f"{self._base}.node.{info.id}"
        for subject, handler in (
            (f"{mine}.letter.*", on_letter),
            (f"{mine}.wake", on_wake),
            (f"{self._base}.hb", on_beat),
            (f"{self._base}.bye", on_goodbye),
            (f"{self._base}.who", on_roll_call),
        ):
            self._subscriptions.append(await nc.subscribe(subject, cb=handler))
        self._remember(info)
        await self._announce()
        await nc.publish(f"{self._base}.who", b"")
        await nc.flush()
        # Answers to the roll call arrive within a round trip; a node that is missed is learnt by its next beat.
        await nc.flush()
        self._beat = asyncio.get_running_loop().create_task(self._heartbeats())

    async def leave(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        for task in self._answering:
            task.cancel()
        nc = self._broker.nc
        if nc.is_connected:
            await nc.publish(f"{self._base}.bye", encode(self._info))
            for subscription in self._subscriptions:
                await subscription.unsubscribe()
            await nc.flush()

    def update(self, info: NodeInfo) -> None:
        self._info = info

    def live(self) -> dict[str, NodeInfo]:
        limit = asyncio.get_running_loop().time() - DEAD_AFTER_S
        live = {k: info for k, (info, at) in self._seen.items() if at > limit or not self._was_connected}
        if self._info.id:
            live[self._info.id] = self._info
        return live

    # ---- membership ---------------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        while True:
            connected = self._broker.nc.is_connected
            if connected and not self._was_connected:
                # Nobody could be heard while the broker was away: silence then is no sign of death.
                now = asyncio.get_running_loop().time()
                self._seen = {k: (info, now) for k, (info, _) in self._seen.items()}
            self._was_connected = connected
            if connected:
                try:
                    await self._announce()
                except Exception as error:
                    log.warning("a heartbeat was not sent: %s", error)
            await asyncio.sleep(HEARTBEAT_S)

    async def _announce(self) -> None:
        await self._broker.nc.publish(f"{self._base}.hb", encode(self._info))

    def _heard(self, data: bytes, *, gone: bool) -> None:
        try:
            info = _info_decoder.decode(data)
        except msgspec.DecodeError:
            log.warning("a heartbeat did not decode")
            return
        if gone:
            self._seen.pop(info.id, None)
        else:
            self._remember(info)

    def _remember(self, info: NodeInfo) -> None:
        now = asyncio.get_running_loop().time()
        self._seen[info.id] = (info, now)
        if len(self._seen) > 1000:
            self._seen = {k: v for k, v in self._seen.items() if now - v[1] < 10 * DEAD_AFTER_S}

    # ---- letters ------------------------------------------------------------------------------------------

    async def ask(self, node: str, letter: bytes, timeout: float) -> bytes:
        import nats.errors

        try:
            reply = await self._broker.nc.request(
                f"{self._base}.node.{node}.letter.ask", letter, timeout=timeout
            )
        except nats.errors.NoRespondersError:
            raise AskTimeout(f"node {node} is gone") from None
        except (TimeoutError, nats.errors.Error) as error:
            raise AskTimeout(f"no reply from node {node} within {timeout:g} s ({error})") from None
        return bytes(reply.data)

    async def tell(self, node: str, letter: bytes) -> None:
        await self._broker.nc.publish(f"{self._base}.node.{node}.letter.tell", letter)

    async def wake(self, node: str, address: str) -> None:
        await self._broker.nc.publish(f"{self._base}.node.{node}.wake", address.encode())

    # ---- inboxes ------------------------------------------------------------------------------------------

    async def put(self, command: Command) -> None:
        reply = await self._publish(
            f"{self._base}.inbox.{_tail(command.to)}", encode(command), {"Nats-Msg-Id": command.id}
        )
        if "error" in reply:
            raise LogError(f"the inbox refused a command for {command.to}: {reply['error']}")

    async def pending(self, address: str, after: int) -> list[Inbound]:
        out: list[Inbound] = []
        subject = f"{self._base}.inbox.{_tail(address)}"
        while True:
            found = await self._message(self._inbox, {"seq": after + 1, "next_by_subj": subject})
            if found is None:
                return out
            after, data = found
            try:
                out.append(Inbound(after, decode_command(data)))
            except BadMessage as error:
                log.error("inbox message %d for %s is dropped: %s", after, address, error)
                await self.remove(after)

    async def remove(self, sequence: int) -> None:
        from nexactor.events.broker import ApiError

        try:
            await self._broker.api(f"STREAM.MSG.DELETE.{self._inbox}", {"seq": sequence, "no_erase": True})
        except ApiError as error:
            # Deleted before, by a request whose reply a broker restart swallowed: that is what was wanted.
            if error.code not in (_NO_MESSAGE, 10043, 10057):
                raise

    async def addresses_pending(self) -> list[str]:
        prefix = f"{self._base}.inbox."
        reply = await self._broker.api(f"STREAM.INFO.{self._inbox}", {"subjects_filter": f"{prefix}>"})
        return [_address(s[len(prefix) :]) for s in reply.get("state", {}).get("subjects") or {}]

    # ---- placements ---------------------------------------------------------------------------------------

    async def place_of(self, address: str) -> str | None:
        found = await self._place(address)
        return found[1] if found else None

    async def place(self, address: str, node: str, *, instead_of: str | None) -> str:
        while True:
            found = await self._place(address)
            if (found[1] if found else None) != instead_of and found:
                return found[1]
            reply = await self._publish(
                f"{self._base}.place.{_tail(address)}",
                node.encode(),
                {"Nats-Expected-Last-Subject-Sequence": str(found[0] if found else 0)},
            )
            error = reply.get("error")
            if error is None:
                return node
            if error.get("err_code") != _WRONG_SEQUENCE:
                raise LogError(f"{address} cannot be placed: {error}")

    async def unplace(self, address: str) -> None:
        subject = f"{self._base}.place.{_tail(address)}"
        found = await self._place(address)
        if found and found[1] == self._info.id:
            await self._broker.api(f"STREAM.PURGE.{self._places}", {"filter": subject, "seq": found[0] + 1})

    async def _place(self, address: str) -> tuple[int, str] | None:
        found = await self._message(self._places, {"last_by_subj": f"{self._base}.place.{_tail(address)}"})
        return (found[0], found[1].decode()) if found else None

    # ---- JetStream ----------------------------------------------------------------------------------------

    async def _create(self, name: str, subjects: str, extra: dict[str, Any]) -> None:
        config = {
            "name": name,
            "subjects": [subjects],
            "storage": "file",
            "num_replicas": 1,
            "allow_direct": False,
            **extra,
        }
        from nexactor.events.broker import ApiError

        try:
            await self._broker.api(f"STREAM.CREATE.{name}", config)
        except ApiError as error:
            if error.code != 10058:  # It exists already, perhaps with an operator's own settings.
                raise

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str]) -> dict[str, Any]:
        from nexactor.events.broker import passes_by_itself

        while True:
            message = await self._broker.request(subject, data, headers=headers, attempt=5.0)
            reply: dict[str, Any] = msgspec.json.decode(message.data)
            error = reply.get("error")
            if not error or not passes_by_itself(error.get("err_code", 0), error.get("code", 0)):
                return reply
            await asyncio.sleep(0.1)

    async def _message(self, stream: str, query: dict[str, Any]) -> tuple[int, bytes] | None:
        from nexactor.events.broker import ApiError

        try:
            message = (await self._broker.api(f"STREAM.MSG.GET.{stream}", query))["message"]
        except ApiError as error:
            if error.code == _NO_MESSAGE:
                return None
            raise
        return int(message["seq"]), base64.b64decode(message.get("data") or "")
