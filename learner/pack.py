"""Tree packing: samples that share a prefix share its computation, forward and backward.

Samples are branches of a tree of tokens (arXiv 2511.00413). A pack lists the tree's tokens in depth-first
order, each prefix once; a token's position is its depth, it attends to its ancestors and itself, and its loss
is taken with the hidden state of its parent, which at a branch point predicts the first token of every child.
Losses and gradients equal those of training the branches apart; only the work is less.

Because order is depth-first, a subtree is an interval: token k is an ancestor of q (or q itself) exactly when
k <= q < end[k]. One integer a token thus states the whole mask, and attention can skip what no query of a
block sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexactor.events.errors import NexactorError
from nexactor.learner.data import Sample

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]

BLOCK = 64
"""Tokens in a block of the block-sparse attention."""


@dataclass(frozen=True)
class Pack:
    """Token trees as arrays of fixed length; the only thing a train step sees.

    Per token, [time]: `tokens`, `positions` (depth in its tree), `end` (one past its subtree, see above). Per
    target, [targets]: `source` (index of the token whose hidden state predicts it), `target` (its id),
    `weight` (sum over the branches that train on it, 0 for padding). Per query block, [time / BLOCK, width]:
    `blocks`, the key blocks that some query in it sees, -1 for none. `unique` tokens are real; `total` is
    what the branches have together.
    """

    tokens: Ints
    positions: Ints
    end: Ints
    source: Ints
    target: Ints
    weight: Floats
    blocks: Ints
    unique: int
    total: int
    samples: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(time, targets, blocks a query block sees): one compiled step for each."""
        return len(self.tokens), len(self.target), self.blocks.shape[1]


def tree_mask(end: Ints) -> NDArray[np.bool_]:
    """The dense mask, [time, time]: row q, column k. For tests, for printing and for small packs."""
    index = np.arange(len(end))
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


def pack(
    samples: Sequence[Sample],
    buckets: Sequence[int],
    *,
    merge: bool = True,
) -> list[Pack]:
    """Pack samples into as few trees of bucketed length as a greedy pass finds.

    `buckets` are the allowed lengths, ascending multiples of BLOCK. Samples are sorted by their ids, so that
    those which share a prefix are neighbours, then cut into packs of at most the largest bucket; each pack is
    padded to the smallest bucket that holds it. The result depends on the samples and their order only.
    `merge` sums the weights of branches that train on the same token of the tree; without it every branch
    keeps its own target entry (for objectives that are not linear in the weight). Raises NexactorError for a
    sample longer than the largest bucket.
    """
    limit = buckets[-1]
    order = sorted(range(len(samples)), key=lambda i: (samples[i].ids.astype(">u4").tobytes(), i))
    groups: list[list[int]] = []
    used = 0
    for previous, i in zip([-1, *order], order, strict=False):
        size = len(samples[i].ids)
        if size > limit:
            raise NexactorError(
                f"a sample of run {samples[i].run} has {size} tokens and the largest bucket {limit}: "
                "raise `buckets` or lower `data.max_tokens`"
            )
        new = size if previous < 0 else size - common_prefix(samples[previous].ids, samples[i].ids)
        if groups and used + new <= limit:
            groups[-1].append(i)
            used += new
        else:
            groups.append([i])
            used = size
    return [_build(samples, group, buckets, merge) for group in groups]


def common_prefix(a: Ints, b: Ints) -> int:
    """How many leading ids two sequences share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _build(samples: Sequence[Sample], group: Sequence[int], buckets: Sequence[int], merge: bool) -> Pack:
    """One pack of the samples `group`, which are sorted by ids."""
    depth = max(len(samples[i].ids) for i in group)
    path = np.zeros(depth, np.int32)  # index in the pack of the current branch's token at each depth
    tokens, positions, parents = [], [], []
    end = np.zeros(buckets[-1], np.int32)
    weights: list[tuple[Ints, Floats]] = []
    previous = np.zeros(0, np.int32)
    count = total = 0
    for i in group:
        sample = samples[i]
        ids = sample.ids
        shared = common_prefix(previous, ids)
        end[path[shared : len(previous)]] = count  # what the last branch had beyond the fork is complete
        new = len(ids) - shared
        path[shared : len(ids)] = np.arange(count, count + new)
        tokens.append(ids[shared:])
        positions.append(np.arange(shared, len(ids)))
        parents.append(
            np.concatenate([path[shared - 1 : shared] if shared else [-1], path[shared : len(ids) - 1]])
        )
        trained = np.flatnonzero(sample.weights[1:]) + 1  # nothing predicts a first token
        weights.append((path[trained], sample.weights[trained]))
        count, total, previous = count + new, total + len(ids), ids
    end[path[: len(previous)]] = count
    time = next(b for b in buckets if b >= count)
    index = np.concatenate([w[0] for w in weights])
    weight = np.concatenate([w[1] for w in weights])
    if merge:
        summed = np.zeros(count, np.float32)
        np.add.at(summed, index, weight)
        index = np.flatnonzero(summed)
        weight = summed[index]
    parent = np.concatenate(parents).astype(np.int32)
    flat = np.concatenate(tokens).astype(np.int32)
    end = end[:time].copy()
    end[count:] = np.arange(count + 1, time + 1)  # padding sees itself, so that its softmax has something
    targets = _target_bucket(len(index), time)
    return Pack(
        tokens=_ints(flat, time),
        positions=_ints(np.concatenate(positions), time),
        end=end,
        source=_ints(parent[index], targets),
        target=_ints(flat[index], targets),
        weight=_floats(weight, targets),
        blocks=visible_blocks(end),
        unique=count,
        total=total,
        samples=tuple(group),
    )


def _ints(values: NDArray[np.integer[Any]], size: int) -> Ints:
    """`values` as int32, padded with zeros to `size`."""
    out = np.zeros(size, np.int32)
    out[: len(values)] = values
    return out


def _floats(values: Floats, size: int) -> Floats:
    out = np.zeros(size, np.float32)
    out[: len(values)] = values
    return out


def _target_bucket(count: int, time: int) -> int:
    """A quarter, a half, or all of the tokens, then doublings: few shapes, little wasted on the output matrix."""
    size = max(time // 4, 1)
    while size < count:
        size *= 2
    return size


def visible_blocks(end: Ints) -> Ints:
    """For every block of queries, the blocks of keys that it sees, [blocks, width], padded with -1.

    `width` is rounded up to one of few sizes (2, 3, 4, 6, 8, 12, ... at most all blocks), so that packs share
    compiled steps.
    """
    count = len(end) // BLOCK
    first = np.arange(count) * BLOCK
    # Key k is seen by queries k..end[k]-1, hence by query block b when k < first[b] + BLOCK and end[k] >
    # first[b].
    reach = end.reshape(count, BLOCK).max(axis=1)
    seen = (reach[None, :] > first[:, None]) & (np.arange(count)[None, :] <= np.arange(count)[:, None])
    widest = int(seen.sum(axis=1).max())
    power = 1 << (widest - 1).bit_length()
    width = min(3 * power // 4 if widest <= 3 * power // 4 else power, count)
    out = np.full((count, width), -1, np.int32)
    for b in range(count):
        keys = np.flatnonzero(seen[b])
        out[b, : len(keys)] = keys
    return out
