"""Attention along a tree of tokens: dense for short packs, block-sparse where branches do not see each other.

Both compute the same thing. The block-sparse form gives each block of queries only the blocks of keys that
hold an ancestor of one of them, so cost follows the tree instead of the square of its size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nexactor.learner.model import Attend
from nexactor.learner.pack import BLOCK

_LOWEST = -1e30


def dense_tree_attend(end: Array) -> Attend:
    """Attention under the mask k <= q < end[k], [time, time], for packs of [1, time] tokens."""
    index = jnp.arange(end.shape[0])
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])

    def attend(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None]), cache

    return attend


def tree_attend(end: Array, blocks: Array) -> Attend:
    """Attention along ancestors for packs of [1, time] tokens; dense where nearly all blocks are seen.

    `end`: [time] int32 and `blocks`: [time / BLOCK, width] int32 as in `pack.Pack`.
    """
    count, width = blocks.shape
    if 4 * width > 3 * count:  # measured on CPU: below this, selecting blocks costs less than it saves
        return dense_tree_attend(end)
    select = jax.nn.one_hot(blocks, count, dtype=jnp.float32)  # [query block, slot, key block]
    index = jnp.arange(count * BLOCK).reshape(count, BLOCK)
    keys = index[jnp.maximum(blocks, 0)]  # [query block, slot, BLOCK]
    ends = end.reshape(count, BLOCK)[jnp.maximum(blocks, 0)]
    queries = index[:, :, None, None]
    mask = (keys[:, None] <= queries) & (queries < ends[:, None]) & (blocks >= 0)[:, None, :, None]
    mask = mask.reshape(count, 1, 1, BLOCK, width * BLOCK)

    @jax.checkpoint  # scores are cheaper to compute again than to keep for every layer
    def one_layer(q: Array, k: Array, v: Array) -> Array:
        _, time, heads, dim = q.shape
        kv = k.shape[2]
        # Selecting blocks is a product with zeros and ones: exact, and so is its transpose, where a scatter
        # is slow.
        chosen = select.astype(k.dtype)
        k_seen, v_seen = (
            jnp.einsum("bwn,nx->bwx", chosen, x.reshape(count, -1)).reshape(count, width * BLOCK, kv, dim)
            for x in (k[0], v[0])
        )
        grouped = q.reshape(count, BLOCK, kv, heads // kv, dim)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k_seen, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores * dim**-0.5, _LOWEST)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", shares, v_seen).reshape(1, time, heads, dim)

    def attend(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
        return one_layer(q, k, v), cache

    return attend
