"""Fixtures of the runtime's tests: systems in memory and over a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from nexactor.events.memory import MemoryLog
from nexactor.system import System
from nexactor.transport_memory import MemoryNetwork


@pytest.fixture
async def system() -> AsyncIterator[System]:
    """One node, everything in memory."""
    async with System(log=MemoryLog(), transport=MemoryNetwork().transport()) as system:
        yield system
