"""What a tool is: a typed function with a JSON schema, a rule for repeating it, a time limit and an output limit.

A `Tool` is made by the decorator in `nexactor.tools.decorator`. The agent shell calls `Tool.run` with the argument
text exactly as the model wrote it; whatever goes wrong comes back as a `ToolError` whose text the model reads.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
import msgspec

from nexactor.events.errors import NexactorError
from nexactor.events.messages import ToolSpec

Repeat = Literal["safe", "idempotent", "never"]
"""May a call that started but has no known end be made again? `safe`: it only reads. `idempotent`: its effect id is
the idempotency key. `never`: ask the agent or a person (`outcome_unknown`)."""


class ToolError(NexactorError):
    """A tool call failed; the message is the tool's answer to the model and says what to do instead."""


class ToolContext(msgspec.Struct, frozen=True):
    """What a tool may know about the call it serves; injected into a parameter annotated `ToolContext`.

    `effect_id` is the same when the same call is made again after a crash: it is the idempotency key.
    """

    effect_id: str = ""
    run: str = ""
    agent: str = ""
    workspace: Path | None = None
    labels: Mapping[str, str] = {}


class ToolResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a tool answered. `truncated` counts the characters that were cut off at the tool's output limit."""

    text: str
    truncated: int = 0


class Tool:
    """A typed function as a model and an agent see it. Calling it (`tool(...)`) calls the plain function."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        spec: ToolSpec,
        arguments: type[msgspec.Struct],
        context_parameter: str | None,
        repeat: Repeat,
        timeout: float,
        output_limit: int,
    ) -> None:
        self.function = function
        self.spec = spec
        self.repeat: Repeat = repeat
        self.timeout = timeout
        self.output_limit = output_limit
        self.__doc__ = function.__doc__
        self._arguments = arguments
        self._decoder = msgspec.json.Decoder(arguments)
        self._context_parameter = context_parameter
        self._is_async = inspect.iscoroutinefunction(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Tool({self.name!r}, binding={self.binding!r}, repeat={self.repeat!r})"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def binding(self) -> str:
        """Where it can be loaded from: `module:qualname`, as `load_tool` reads it."""
        module = getattr(self.function, "__module__", None) or "__main__"
        return f"{module}:{getattr(self.function, '__qualname__', self.name)}"

    async def run(self, arguments: str, context: ToolContext) -> ToolResult:
        """Call the tool with `arguments`, the JSON text of an object, as the model wrote it.

        A synchronous function runs in a thread; a thread cannot be stopped, so at the time limit or on cancellation
        the call ends but its thread runs on to its own end. Asynchronous functions are cancelled where they wait.
        Raises ToolError for anything the function or its arguments did wrong, and for the time limit.
        """
        keywords = self._parse(arguments)
        if self._context_parameter is not None:
            keywords[self._context_parameter] = context
        value: Any = None
        with anyio.move_on_after(self.timeout) as scope:
            try:
                value = await self._call(keywords)
            except ToolError as error:
                raise ToolError(_cut(str(error), self.output_limit).text) from error
            except (Exception, SystemExit) as error:
                text = f"{type(error).__name__}: {error}"
                raise ToolError(_cut(text, self.output_limit).text) from error
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if scope.cancel_called or task is None or task.cancelling():
                    raise
                raise ToolError(f"{self.name} cancelled itself") from error
        if scope.cancelled_caught:
            raise ToolError(f"{self.name} was stopped: it took longer than {self.timeout:g} seconds")
        return self._result(value)

    async def _call(self, keywords: dict[str, Any]) -> Any:
        if self._is_async:
            return await self.function(**keywords)
        value = await anyio.to_thread.run_sync(lambda: self.function(**keywords), abandon_on_cancel=True)
        return await value if inspect.isawaitable(value) else value

    def _parse(self, arguments: str) -> dict[str, Any]:
        try:
            value = self._decoder.decode((arguments.strip() or "{}").encode("utf-8", "replace"))
        except msgspec.ValidationError as error:
            raise ToolError(f"{self.name}: {error}. {self._valid_fields()}") from error
        except msgspec.DecodeError as error:
            raise ToolError(
                f"{self.name}: the arguments are not JSON ({error}). {self._valid_fields()}"
            ) from error
        return {name: getattr(value, name) for name in self._arguments.__struct_fields__}

    def _valid_fields(self) -> str:
        properties: dict[str, Any] = self.spec.parameters.get("properties", {})
        if not properties:
            return "It takes no arguments: {}"
        required = self.spec.parameters.get("required", ())
        described = (
            f"{name}{'' if name in required else '?'} ({_type_name(schema)})"
            for name, schema in properties.items()
        )
        return f"Valid fields: {', '.join(described)}"

    def _result(self, value: Any) -> ToolResult:
        if isinstance(value, ToolResult):
            cut = _cut(value.text, self.output_limit)
            return ToolResult(cut.text, value.truncated + cut.truncated)
        if isinstance(value, str):
            return _cut(value, self.output_limit)
        try:
            return _cut(msgspec.json.encode(value).decode(), self.output_limit)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ToolError(f"{self.name} ran, but its result cannot be written as JSON: {error}") from error


def _cut(text: str, limit: int) -> ToolResult:
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate could not be stored
    if len(text) <= limit:
        return ToolResult(text)
    cut = len(text) - limit
    return ToolResult(f"{text[:limit]}\n[{cut} more characters cut]", cut)


def _type_name(schema: Mapping[str, Any]) -> str:
    if "type" in schema:
        kind = schema["type"]
        return "|".join(kind) if isinstance(kind, list) else str(kind)
    if "enum" in schema:
        return "|".join(repr(v) for v in schema["enum"])
    if "anyOf" in schema:
        return "|".join(_type_name(s) for s in schema["anyOf"])
    return str(schema["$ref"]).rpartition("/")[2] if "$ref" in schema else "any"
