"""How actor messages travel: msgspec structs named by their type, MessagePack bytes, no pickle.

A message class is a `msgspec.Struct`; its class name is its type tag. An actor class lists the messages it
accepts, so what arrives for it decodes into those types or is refused.
"""

from __future__ import annotations

from typing import Any

import msgspec

from nexactor.events.errors import NexactorError

_encoder = msgspec.msgpack.Encoder()


class BadMessage(NexactorError):
    """A message that this actor does not accept, or bytes that are not a message."""


class MailboxFull(NexactorError):
    """The target's mailbox is at its bound; the sender may wait and try again."""


class AskTimeout(NexactorError):
    """No reply before the deadline; the message may or may not have been handled."""


class ActorFailed(NexactorError):
    """The actor raised while it handled the message; the text is its error."""


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """One message on the wire. `deadline` is Unix seconds (0: none), honoured at the far end too."""

    to: str
    type: str
    body: bytes
    sender: str = ""
    deadline: float = 0.0
    traceparent: str = ""


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The answer to an ask: `ok` and an encoded value, or an error's kind and text."""

    ok: bool
    type: str
    body: bytes


class Command(msgspec.Struct, frozen=True, array_like=True):
    """A durable message in an actor's inbox; `id` makes its handling idempotent."""

    id: str
    to: str
    type: str
    body: bytes
    sender: str = ""


_letters = msgspec.msgpack.Decoder(Letter)
_replies = msgspec.msgpack.Decoder(Reply)
_commands = msgspec.msgpack.Decoder(Command)
_values = msgspec.msgpack.Decoder()


def encode(value: Any) -> bytes:
    """MessagePack of any msgspec-encodable value."""
    try:
        return _encoder.encode(value)
    except TypeError as error:
        raise BadMessage(f"{type(value).__name__} cannot be sent to an actor: {error}") from error


def decode_letter(data: bytes) -> Letter:
    """Raises BadMessage for bytes that are no letter."""
    try:
        return _letters.decode(data)
    except msgspec.DecodeError as error:
        raise BadMessage(f"not an actor message: {error}") from error


def decode_reply(data: bytes) -> Reply:
    """Raises BadMessage for bytes that are no reply."""
    try:
        return _replies.decode(data)
    except msgspec.DecodeError as error:
        raise BadMessage(f"not an actor's reply: {error}") from error


def decode_command(data: bytes) -> Command:
    """Raises BadMessage for bytes that are no command."""
    try:
        return _commands.decode(data)
    except msgspec.DecodeError as error:
        raise BadMessage(f"not an inbox command: {error}") from error


def decode_message(accepts: tuple[type[msgspec.Struct], ...], type_name: str, body: bytes) -> Any:
    """The typed message, or BadMessage if the actor does not accept that type or the body does not fit it."""
    for cls in accepts:
        if cls.__name__ == type_name:
            try:
                return msgspec.msgpack.decode(body, type=cls)
            except msgspec.DecodeError as error:
                raise BadMessage(f"{type_name}: {error}") from error
    names = ", ".join(c.__name__ for c in accepts) or "none"
    raise BadMessage(f"messages of type {type_name} are not accepted here (accepted: {names})")


def decode_value(body: bytes, reply: type | None) -> Any:
    """A reply's value, as `reply` if given, else as builtins."""
    try:
        return _values.decode(body) if reply is None else msgspec.msgpack.decode(body, type=reply)
    except msgspec.DecodeError as error:
        raise BadMessage(f"the reply does not fit {reply}: {error}") from error
