"""Agent specs from YAML files, with errors that point at file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from nexactor.events.errors import ConfigError, NexactorError
from nexactor.spec import (
    NAME_RULE,
    AgentSpec,
    LLMConfig,
    SpecTree,
    SubAgentEntry,
    ToolEntry,
    expand_env,
    valid_name,
)
from nexactor.tools import load_tool


class ToolYaml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `tools`. `binding` is `module:function`; `name` and `repeat` override what the code says."""

    binding: str
    name: str = ""
    repeat: Literal["", "safe", "idempotent", "never"] = ""


class SubAgentYaml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `sub_agents`. `config_path` is relative to the file that names it."""

    name: str
    config_path: str


class AgentYaml(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys of an agent file. `system_prompt` is text, a file's path or a Jinja file's, by `system_prompt_type`."""

    name: str
    llm_config: LLMConfig
    type: Literal["agent"] = "agent"
    description: str = ""
    system_prompt: str = ""
    system_prompt_type: Literal["string", "file", "jinja"] = "string"
    system_prompt_suffix: str = ""
    context: dict[str, Any] = {}
    tools: list[ToolYaml] = []
    sub_agents: list[SubAgentYaml] = []
    stop_tools: list[str] = []
    max_iterations: int = 100


def load_spec(path: str | Path, *, env: Mapping[str, str] | None = None) -> SpecTree:
    """Load an agent and, recursively, its sub-agents.

    `env` replaces the process environment for `${env.X}`. Raises ConfigError with file, line, key and the nearest
    valid key: for an unknown key, a wrong type, a missing file, an undefined variable, a cycle of sub-agents, a tool
    that does not import.
    """
    specs: dict[str, AgentSpec] = {}
    root = _load(Path(path), env, specs, ())
    return SpecTree(root, specs)


def _load(
    path: Path, env: Mapping[str, str] | None, specs: dict[str, AgentSpec], above: tuple[Path, ...]
) -> AgentSpec:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(p.name for p in (*above[above.index(resolved) :], resolved))
        raise ConfigError(
            f"{path}: these agents are sub-agents of each other: {chain}\n  remove one of the links"
        )
    source = _Source(path)
    config = source.convert(env)
    tools = tuple(_tool(source, i, entry) for i, entry in enumerate(config.tools))
    subs = []
    for i, entry in enumerate(config.sub_agents):
        target = path.parent / entry.config_path
        if not target.is_file():
            raise source.error(("sub_agents", i, "config_path"), f"there is no file {target}")
        child = _load(target, env, specs, (*above, resolved))
        subs.append(SubAgentEntry(entry.name, child.description, child.digest))
    names = [t.spec.name for t in tools] + [s.name for s in subs]
    for i, sub in enumerate(subs):
        if not valid_name(sub.name):
            raise source.error(("sub_agents", i, "name"), f"{sub.name!r}: {NAME_RULE}")
    for name in names:
        if names.count(name) > 1:
            raise source.error(
                ("tools",), f"two tools or sub-agents are called {name!r}: rename one (`name:`)"
            )
    for i, name in enumerate(config.stop_tools):
        if name not in names:
            raise source.error(("stop_tools", i), f"there is no tool {name!r}{_nearest(name, names)}")
    if config.max_iterations < 1:
        raise source.error(("max_iterations",), "must be at least 1")
    spec = AgentSpec(
        name=config.name,
        llm=config.llm_config,
        system_prompt=_prompt(source, config),
        description=config.description,
        tools=tools,
        sub_agents=tuple(subs),
        stop_tools=tuple(config.stop_tools),
        max_iterations=config.max_iterations,
    )
    specs[spec.digest] = spec
    return spec


def _tool(source: _Source, index: int, entry: ToolYaml) -> ToolEntry:
    folder = source.path.parent.resolve()
    top = entry.binding.partition(":")[0].partition(".")[0]
    beside = folder if (folder / f"{top}.py").is_file() or (folder / top).is_dir() else None
    try:
        tool = load_tool(entry.binding, beside=beside)
    except NexactorError as error:
        raise source.error(("tools", index, "binding"), str(error)) from error
    spec = msgspec.structs.replace(tool.spec, name=entry.name) if entry.name else tool.spec
    return ToolEntry(spec, entry.binding, entry.repeat or tool.repeat, str(beside) if beside else "")


def _prompt(source: _Source, config: AgentYaml) -> str:
    text = config.system_prompt
    if config.system_prompt_type != "string":
        file = source.path.parent / text
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise source.error(
                ("system_prompt",), f"the prompt file {file} cannot be read: {error}"
            ) from error
        if config.system_prompt_type == "jinja":
            import jinja2

            try:
                template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(
                    text
                )
                text = template.render(**config.context)
            except Exception as error:  # A template can raise whatever its expressions raise.
                raise source.error(("system_prompt",), f"the template {file}: {error}") from error
    return text.rstrip("\n") + config.system_prompt_suffix


class _Source:
    """A YAML file, its values, and the line of every key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str | int, ...], int] = {}
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise ConfigError(f"{path}: the agent's file cannot be read: {reason}") from error
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self.value = yaml.safe_load(text)
            if node is not None:
                self._walk(node, ())
        except RecursionError as error:
            raise ConfigError(f"{path}: an anchor of this file contains itself: remove the alias") from error
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            raise ConfigError(
                f"{path}{line}: this is not YAML: {getattr(error, 'problem', error)}"
            ) from error
        if not isinstance(self.value, dict):
            raise ConfigError(
                f"{path}:1: an agent file is a mapping of keys (name, system_prompt, llm_config, ...)"
            )

    def _walk(self, node: yaml.Node, at: tuple[str | int, ...]) -> None:
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if (*at, str(key.value)) in self.lines:
                    raise self.error(
                        (*at, str(key.value)), f"stands twice, again in line {key.start_mark.line + 1}"
                    )
                self.lines[(*at, str(key.value))] = key.start_mark.line + 1
                self._walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self._walk(value, (*at, i))

    def error(self, at: tuple[str | int, ...], text: str) -> ConfigError:
        """A ConfigError at a key, or at its nearest parent that the file has."""
        known = at
        while known and known not in self.lines:
            known = known[:-1]
        return ConfigError(f"{self.path}:{self.lines.get(known, 1)}: {_dotted(at)}: {text}")

    def convert(self, env: Mapping[str, str] | None) -> AgentYaml:
        value = self._expand(self.value, (), env)
        try:
            # strict=False: an expanded ${env.N} is text, also where a number is meant.
            return msgspec.convert(value, AgentYaml, strict=False)
        except msgspec.ValidationError as error:
            message, _, where = str(error).partition(" - at `")
            at = _path(where.rstrip("`"))
            unknown = re.search(r"unknown field `([^`]*)`", message)
            if unknown:
                key = unknown.group(1)
                raise self.error((*at, key), f"there is no such key{_nearest(key, _fields(at))}") from error
            raise self.error(at, message) from error

    def _expand(self, value: Any, at: tuple[str | int, ...], env: Mapping[str, str] | None) -> Any:
        if isinstance(value, dict):
            return {k: self._expand(v, (*at, str(k)), env) for k, v in value.items()}
        if isinstance(value, list):
            return [self._expand(v, (*at, i), env) for i, v in enumerate(value)]
        if not isinstance(value, str) or "${env." not in value:
            return value
        try:
            expanded = expand_env(value, "", env)
        except ConfigError as error:
            raise self.error(at, str(error).removeprefix(": ")) from error
        # A secret is checked to be there, but its name is what goes into the log.
        return value if at and at[-1] == "api_key" else expanded


def _fields(at: tuple[str | int, ...]) -> tuple[str, ...]:
    """The valid keys at a place in an agent file."""
    cls = {"llm_config": LLMConfig, "tools": ToolYaml, "sub_agents": SubAgentYaml}.get(
        str(at[0]) if at else ""
    )
    return (cls or AgentYaml).__struct_fields__


def _nearest(name: str, valid: Any) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid) or 'none'}"


def _path(text: str) -> tuple[str | int, ...]:
    """`$.tools[2].name` -> ("tools", 2, "name")."""
    return tuple(
        int(index) if index else key for key, index in re.findall(r"\.([A-Za-z_]\w*)|\[(\d+)\]", text)
    )


def _dotted(at: tuple[str | int, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in at).lstrip(".") or "the file"
