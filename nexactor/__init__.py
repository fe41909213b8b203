"""nexactor: an asyncio actor system with event sourcing for LLM agents that learn.

Names are imported when first used (PEP 562): `import nexactor` loads no broker client, no model SDK, no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexactor.events.lazy import lazy_exports

if TYPE_CHECKING:
    from nexactor.events.errors import NexactorError as NexactorError

_EXPORTS = {
    "NexactorError": "nexactor.events.errors",
}
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
