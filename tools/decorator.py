"""`@tool`: a typed function becomes a `Tool`; `load_tool`: a tool is found by its binding `module:name`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import msgspec

from nexactor.events.errors import ConfigError
from nexactor.events.messages import ToolSpec
from nexactor.tools.protocol import Repeat, Tool, ToolContext

_REPEATS: tuple[Repeat, ...] = ("safe", "idempotent", "never")


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    repeat: Repeat = "never",
    timeout: float = 30.0,
    output_limit: int = 8000,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    repeat: Repeat = "never",
    timeout: float = 30.0,
    output_limit: int = 8000,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Turn a typed function (`async def`, or `def`: it runs in a thread) into a `Tool`.

    The JSON schema comes from the signature (`Annotated[str, msgspec.Meta(description=…)]` is understood), the
    description from the docstring's first line. A parameter annotated `ToolContext` is injected and hidden.
    `timeout` is in seconds, `output_limit` in characters. Raises ConfigError for a function that cannot be a tool.
    """

    def make(function: Callable[..., Any]) -> Tool:
        return _make(function, name=name, repeat=repeat, timeout=timeout, output_limit=output_limit)

    return make if function is None else make(function)


def _make(
    function: Callable[..., Any], *, name: str | None, repeat: Repeat, timeout: float, output_limit: int
) -> Tool:
    tool_name: str = name or str(getattr(function, "__name__", type(function).__name__))
    where = f"tool {tool_name} ({getattr(function, '__module__', '?')})"
    if repeat not in _REPEATS:
        raise ConfigError(f"{where}: repeat={repeat!r} is not one of {', '.join(_REPEATS)}")
    if timeout <= 0 or output_limit <= 0:
        raise ConfigError(f"{where}: timeout (seconds) and output_limit (characters) must be above zero")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"{where}: an annotation cannot be resolved: {error}. Import that type at module level"
        ) from error
    fields: list[Any] = []
    context_parameter: str | None = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"{where}: parameter {parameter} has no place in a JSON object; give it a plain name"
            )
        if parameter.name not in hints:
            raise ConfigError(f"{where}: parameter {parameter.name} has no type annotation")
        annotation = hints[parameter.name]
        if annotation is ToolContext:
            if context_parameter is not None:
                raise ConfigError(f"{where}: two parameters are annotated ToolContext")
            context_parameter = parameter.name
        elif parameter.default is parameter.empty:
            fields.append((parameter.name, annotation))
        else:
            fields.append((parameter.name, annotation, parameter.default))
    try:
        arguments = msgspec.defstruct(tool_name, fields, kw_only=True, forbid_unknown_fields=True)
        schema, definitions = _schema(arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: its parameters cannot be described as JSON: {error}") from error
    if definitions:
        schema["$defs"] = definitions
    lines = (inspect.getdoc(function) or "").strip().splitlines()
    return Tool(
        function,
        spec=ToolSpec(tool_name, lines[0] if lines else tool_name.replace("_", " "), schema),
        arguments=arguments,
        context_parameter=context_parameter,
        repeat=repeat,
        timeout=timeout,
        output_limit=output_limit,
    )


def _schema(arguments: type[msgspec.Struct]) -> tuple[dict[str, Any], dict[str, Any]]:
    (top,), definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    key = top["$ref"].rpartition("/")[2]
    schema = dict(definitions.pop(key))
    for noise in ("title", "description", "additionalProperties"):
        schema.pop(noise, None)
    schema["additionalProperties"] = False
    return schema, definitions


def load_tool(binding: str, *, beside: Path | None = None) -> Tool:
    """Import the tool at `module:name` (`name` may be dotted).

    A plain typed function found there becomes a tool with the defaults of `@tool`. `beside` is a folder
    searched first, e.g. that of the YAML file that names the binding.
    Raises ConfigError that says what failed to import, where it was looked for, and the nearest names.
    """
    module_name, colon, attribute = binding.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(
            f"tool binding {binding!r} must look like module:name, e.g. nexactor.tools.files:read_file"
        )
    value: Any = _import(binding, module_name, beside)
    found = module_name
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [n for n in dir(value) if not n.startswith("_")]
            origin = f" ({value.__file__})" if getattr(value, "__file__", None) else ""
            raise ConfigError(
                f"tool binding {binding!r}: {found}{origin} has no {part!r}{_nearest(part, names)}"
            )
        value, found = getattr(value, part), f"{found}.{part}"
    if isinstance(value, Tool):
        return value
    if callable(value) and not inspect.isclass(value):
        return tool(value)
    raise ConfigError(
        f"tool binding {binding!r}: {found} is a {type(value).__name__}, not a tool or a typed function"
    )


def _import(binding: str, module_name: str, beside: Path | None) -> Any:
    added = str(beside.resolve()) if beside is not None else None
    if added is not None:
        sys.path.insert(0, added)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise ConfigError(
                f"tool binding {binding!r}: {module_name} was found, but it imports {missing!r}, which is not installed"
            ) from error
        parent = missing.rpartition(".")[0]
        places, names = _siblings(parent)
        raise ConfigError(
            f"tool binding {binding!r}: no module named {missing!r}{_nearest(missing, names)}\n"
            f"looked in: {', '.join(places)}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"tool binding {binding!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        if added is not None and added in sys.path:
            sys.path.remove(added)


def _siblings(parent: str) -> tuple[list[str], list[str]]:
    """Folders searched for the modules of package `parent` ("": top level), and the module names found there."""
    if not parent:
        places = [p or str(Path.cwd()) for p in sys.path]
        # Editable installs lie in no folder of the path, but what is imported has a name.
        imported = {name.partition(".")[0] for name in sys.modules}
        return places, sorted({m.name for m in pkgutil.iter_modules(places)} | imported)
    places = [str(p) for p in getattr(sys.modules.get(parent), "__path__", ())]
    if not places:
        return [f"{parent}, which is a module and not a package"], []
    return places, [f"{parent}.{m.name}" for m in pkgutil.iter_modules(places)]


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""
