"""Slots of the sampler: which tokens each row of the cache holds, and which slot a new prompt gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from nexactor.learner.model import Params
from nexactor.learner.sampling import Ticket

WORTH_COPYING = 16
"""Tokens from which copying a prefix from another slot beats computing it."""

Ids = np.ndarray[Any, np.dtype[np.int32]]
"""Token ids, [time] int32."""


class Weights(msgspec.Struct, frozen=True):
    """Weights, their name, and how many times weights were swapped before them."""

    params: Params
    version: str
    epoch: int


class Slot:
    """A row of the cache and the tokens whose keys and values it holds."""

    def __init__(self, row: int, positions: int) -> None:
        self.row = row
        self.tokens = np.zeros(positions, np.int32)
        self.length = 0
        self.epoch = 0
        self.busy = False
        self.used = 0.0

    def shares(self, prompt: Ids, epoch: int) -> int:
        """How many leading tokens of `prompt` this slot holds, computed on the weights of `epoch`."""
        return common(self.tokens[: self.length], prompt) if self.epoch == epoch else 0


class Active:
    """A request that has a slot."""

    def __init__(self, ticket: Ticket, prompt: Ids, slot: Slot, cached: int, weights: Weights) -> None:
        self.ticket, self.prompt, self.slot, self.cached, self.weights = ticket, prompt, slot, cached, weights
        request = ticket.request
        self.next_token = int(prompt[-1])
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.limit = request.max_tokens
        seed = request.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.seed = (seed >> 32, seed & 0xFFFF_FFFF)
        self.times: list[float] = [0.0, 0.0, 0.0]

    @property
    def remaining(self) -> int:
        """Prompt tokens still to prefill: all but the last are."""
        return len(self.prompt) - 1 - self.slot.length


class Placement(msgspec.Struct, frozen=True):
    """The slot for a new prompt, and the leading tokens it will hold: `cached` of its own, or of `source`'s."""

    slot: Slot
    cached: int
    source: Slot | None = None


def place(slots: Sequence[Slot], prompt: Ids, epoch: int) -> Placement:
    """Choose a free slot (there must be one) for `prompt`, as far as it is to be prefilled.

    A slot whose whole content the prompt continues is taken as it is: the next turn of its conversation. Otherwise the
    slot used longest ago is, and the longest shared prefix is copied there, so that the slot that has it stays
    whole for its own next turn.
    """
    best = max(slots, key=lambda s: s.shares(prompt, epoch))
    cached = best.shares(prompt, epoch)
    if not best.busy and 0 < cached == best.length:
        return Placement(best, cached)
    slot = min((s for s in slots if not s.busy), key=lambda s: (s.length > 0 and s.epoch == epoch, s.used))
    own = slot.shares(prompt, epoch)
    if own < cached and cached >= WORTH_COPYING:
        return Placement(slot, cached, best)
    return Placement(slot, own)


def common(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
