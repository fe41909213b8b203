"""nexactor: an asyncio actor system with event sourcing for LLM agents that learn.

Names are imported when first used (PEP 562): `import nexactor` loads no broker client, no model SDK, no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexactor.events.lazy import lazy_exports

if TYPE_CHECKING:
    from nexactor.actor import Actor as Actor
    from nexactor.actor import ActorRef as ActorRef
    from nexactor.events.errors import NexactorError as NexactorError
    from nexactor.node import Node as Node
    from nexactor.replay import replay_run as replay_run
    from nexactor.rollouts import roll_out as roll_out
    from nexactor.spec import LLMConfig as LLMConfig
    from nexactor.spec_yaml import load_spec as load_spec
    from nexactor.system import Agent as Agent
    from nexactor.system import Run as Run
    from nexactor.system import RunResult as RunResult
    from nexactor.system import System as System
    from nexactor.tools import ToolContext as ToolContext
    from nexactor.tools import tool as tool

_EXPORTS = {
    "Actor": "nexactor.actor",
    "ActorRef": "nexactor.actor",
    "Agent": "nexactor.system",
    "LLMConfig": "nexactor.spec",
    "NexactorError": "nexactor.events.errors",
    "Node": "nexactor.node",
    "Run": "nexactor.system",
    "RunResult": "nexactor.system",
    "System": "nexactor.system",
    "ToolContext": "nexactor.tools",
    "load_spec": "nexactor.spec_yaml",
    "replay_run": "nexactor.replay",
    "roll_out": "nexactor.rollouts",
    "tool": "nexactor.tools",
}
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
