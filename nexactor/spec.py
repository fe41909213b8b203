"""What an agent is: the resolved, storable form of its configuration.

A spec holds everything `decide` and `render` need (prompt text, tool schemas, limits), so that a log can be replayed
without the YAML files, the tools' code or the environment it was made in. Specs are blobs of the log, named by
digest; secrets stay `${env.NAME}` in them and are resolved on the node that calls the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from nexactor.events.errors import ConfigError
from nexactor.events.ids import digest
from nexactor.events.log import EventLog
from nexactor.events.messages import ToolSpec

_VARIABLE = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")


NAME_RULE = "the name of a sub-agent is a tool's name: letters, digits, '_' and '-' only"


def valid_name(name: str) -> bool:
    """Whether a sub-agent may be called so: its name is part of addresses and a tool's name for models."""
    return re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None


class LLMConfig(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The endpoint and how to sample from it. `timeout` is in seconds, for one request.

    `token_ids` asks for the exact token ids and their log-probabilities (our policy server, vLLM and SGLang give
    them; an endpoint that refuses unknown parameters does not want to be asked).
    """

    model: str
    base_url: str = ""
    api_key: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    timeout: float = 600.0
    max_retries: int = 5
    stream: bool = False
    token_ids: bool = False

    @property
    def params(self) -> dict[str, Any]:
        """The sampling parameters, as a request carries them."""
        out: dict[str, Any] = {}
        for name in ("temperature", "max_tokens", "top_p", "seed"):
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        if self.stop:
            out["stop"] = list(self.stop)
        return out


class ToolEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tool of an agent: what the model sees, where its code is, what a recovery may repeat.

    `beside` is a folder to import the binding from first: that of the agent's file, for tools that lie next to it.
    """

    spec: ToolSpec
    binding: str
    repeat: str = "never"
    beside: str = ""


class SubAgentEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sub-agent, called like a tool with one `message`. `spec` is the digest of its own AgentSpec."""

    name: str
    description: str
    spec: str

    @property
    def tool(self) -> ToolSpec:
        """The sub-agent as the calling model sees it."""
        return ToolSpec(
            self.name,
            self.description or f"Hand a task to the agent {self.name}.",
            {
                "type": "object",
                "properties": {"message": {"type": "string", "description": "the task, complete in itself"}},
                "required": ["message"],
                "additionalProperties": False,
            },
        )


class AgentSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One agent, resolved. Loaded from YAML by `load_spec`, or made by `Agent` in Python."""

    name: str
    llm: LLMConfig
    system_prompt: str = ""
    description: str = ""
    tools: tuple[ToolEntry, ...] = ()
    sub_agents: tuple[SubAgentEntry, ...] = ()
    stop_tools: tuple[str, ...] = ()
    max_iterations: int = 100

    @property
    def digest(self) -> str:
        """The digest that names this spec's blob."""
        return digest(self)

    @property
    def tool_specs(self) -> tuple[ToolSpec, ...]:
        """All the model may call: tools, then sub-agents, in the order of the configuration."""
        return tuple(t.spec for t in self.tools) + tuple(s.tool for s in self.sub_agents)


class SpecTree(msgspec.Struct, frozen=True):
    """A root spec and those of all its sub-agents, by digest."""

    root: AgentSpec
    all: dict[str, AgentSpec]

    async def store(self, log: EventLog) -> str:
        """Put every spec, and every tool list, into the log's blobs; returns the root's digest."""
        for spec in self.all.values():
            await log.put_blob(msgspec.json.encode(spec, order="deterministic"))
            await log.put_blob(msgspec.json.encode(spec.tool_specs, order="deterministic"))
        return self.root.digest


async def load_stored_spec(log: EventLog, spec_digest: str) -> AgentSpec:
    """The spec that an AgentStarted event names."""
    return msgspec.json.decode(await log.get_blob(spec_digest), type=AgentSpec)


def expand_env(text: str, where: str, env: Mapping[str, str] | None = None) -> str:
    """Replace `${env.NAME}` and `${env.NAME:default}`. ConfigError, naming `where`, for an undefined variable."""
    values = os.environ if env is None else env

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if name in values:
            return values[name]
        if default is not None:
            return default
        raise ConfigError(
            f"{where}: the environment variable {name} is not set\n"
            f"  set it (export {name}=...), or give a default: ${{env.{name}:default}}"
        )

    return _VARIABLE.sub(value, text)
