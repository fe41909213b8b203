"""The error hierarchy every room shares; it lives in the lowest room so that all can raise it."""

from __future__ import annotations


class NexactorError(Exception):
    """Root of all errors nexactor raises on purpose.

    The message says what happened, to what, and what to do next; the command line prints it on one
    screen, without a traceback, and exits with code 2.
    """


class ConfigError(NexactorError):
    """A file, option or environment variable of the user's is wrong; names file, line and key."""


class LogError(NexactorError):
    """The event log refused or could not serve a request."""


class LogUnavailable(LogError):
    """The broker did not answer within the deadline; nothing is known to be lost, try again."""


class VersionConflict(LogError):
    """Someone else appended to the stream first: the caller is no longer its owner (or never was)."""

    def __init__(self, stream: str, expected: int, actual: int | None) -> None:
        self.stream, self.expected, self.actual = stream, expected, actual
        where = "another version" if actual is None else f"version {actual}"
        super().__init__(
            f"stream {stream} is at {where}, not at the expected {expected}: "
            "another owner has appended to it since; read it again before writing"
        )


class IntegrityError(LogError):
    """Stored bytes do not match the hash chain, the version sequence or a blob digest."""


class BrokerError(NexactorError):
    """The NATS server cannot be started, reached or used (too old, wrong token, port taken)."""
