"""The key-value cache, and the three programs that touch it: prefill, decode, copy of a prefix.

The cache is one pair of arrays [layers, rows, kv_heads, positions, head_dim]: a row for each slot, and one more that
padding may scribble on. The model's forward pass scans over layers and only READS the cache (each layer takes
its part of it by index); the keys and values of the new tokens come out stacked and are written at the end, in
place because the cache is donated. Carrying the cache through the scan would copy all of it at every token.

Attention has two forms with the same result. On CPU each sequence looks at its own window of the cache, the
smallest that holds it, chosen inside the program (measured on SmolLM2-135M, 16 sequences, 1,024 positions: 65 ms a step
against 121 ms for one gathered batch, and no window in the shape, so few compilations). On accelerators, where a
loop over sequences would serialise, the batch shares one window, part of the program's shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from nexactor.learner.model import Attend, Config, Params, forward, logits


class Cache(NamedTuple):
    """Keys and values, each [layers, rows, kv_heads, positions, head_dim]; the last row is scratch."""

    k: Array
    v: Array


class Rows(NamedTuple):
    """Which tokens go where: `tokens` [batch, time]; row `rows[i]` holds `start[i]` tokens before them.

    Built by the host as numpy arrays, traced inside the programs.
    """

    tokens: Any
    rows: Any
    start: Any


class Dice(NamedTuple):
    """How each row samples: `seed` [batch, 2] uint32, `temperature` and `top_p` [batch] float32."""

    seed: Any
    temperature: Any
    top_p: Any


def allocate(config: Config, slots: int, positions: int) -> Cache:
    """An empty cache for `slots` sequences of up to `positions` tokens, in the model's compute dtype."""
    shape = (config.layers, slots + 1, config.kv_heads, positions, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def windows(longest: int) -> tuple[int, ...]:
    """Window sizes, from nothing to `longest`. Each costs compile time in every program, hence few."""
    sizes = [0, 128, 256, 384, 512, 768, *(1 << i for i in range(10, longest.bit_length()))]
    return (*(s for s in sizes if s < longest), longest)


@partial(jax.jit, static_argnames=("config", "window"), donate_argnames=("cache",))
def prefill(params: Params, cache: Cache, rows: Rows, *, config: Config, window: int | None) -> Cache:
    """Put the keys and values of new tokens into the cache. Time may be padded: what is written past a
    sequence's end is overwritten before it is ever looked at, so the cache needs that much room."""
    _, cache = _advance(params, cache, rows, config, window)
    return cache


@partial(jax.jit, static_argnames=("config", "window", "truncate"), donate_argnames=("cache",))
def decode(
    params: Params,
    cache: Cache,
    rows: Rows,
    dice: Dice,
    *,
    config: Config,
    window: int | None,
    truncate: bool,
) -> tuple[Cache, Array, Array]:
    """Feed one token a row and sample the next: ids [batch] int32, log-probabilities [batch] float32.

    Randomness is folded from the row's seed and the position of the sampled token: neighbours do not matter.
    """
    hidden, cache = _advance(params, cache, rows, config, window)
    scores = logits(params, config, hidden[:, 0])
    keys = jax.vmap(jax.random.fold_in)(
        jax.random.wrap_key_data(dice.seed, impl="threefry2x32"), rows.start + rows.tokens.shape[1]
    )
    ids, logprobs = choose(scores, keys, dice.temperature, dice.top_p, truncate=truncate)
    return cache, ids, logprobs


@partial(jax.jit, static_argnames=("length",), donate_argnames=("cache",))
def copy_prefix(cache: Cache, source: Array, target: Array, *, length: int) -> Cache:
    """Copy the first `length` positions of one row to another."""

    def copy(x: Array) -> Array:
        layers, _, heads, _, dim = x.shape
        part = lax.dynamic_slice(x, (0, source, 0, 0, 0), (layers, 1, heads, length, dim))
        return lax.dynamic_update_slice(x, part, (0, target, 0, 0, 0))

    return Cache(copy(cache.k), copy(cache.v))


def choose(
    scores: Array, keys: Array, temperature: Array, top_p: Array, *, truncate: bool
) -> tuple[Array, Array]:
    """Sample one id a row of `scores` [batch, vocab]; temperature 0 takes the best.

    Inverts the cumulative distribution at one uniform number a row, in two levels (blocks, then inside one):
    cheaper than Gumbel noise for a whole vocabulary. The log-probabilities are the policy's own, at temperature 1 and
    before top-p: what a learner compares with. `top_p` keeps every token at least as likely as the last of the
    smallest set that holds that mass (found by bisection: sorting a vocabulary costs more than the model on CPU).
    """
    best = jnp.max(scores, axis=-1, keepdims=True)
    greedy = jnp.argmax(scores, axis=-1)
    z = (scores - best) / jnp.maximum(temperature, 1e-6)[:, None]
    p = jnp.exp(z)
    if truncate:
        p = jnp.where(z >= _threshold(z, p, top_p)[:, None], p, 0.0)
    drawn = _invert(p, jax.vmap(jax.random.uniform)(keys))
    ids = jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
    norm = best[:, 0] + jnp.log(jnp.sum(jnp.exp(scores - best), axis=-1))
    return ids, jnp.take_along_axis(scores, ids[:, None], axis=-1)[:, 0] - norm


def _threshold(z: Array, p: Array, top_p: Array) -> Array:
    """The highest score such that the tokens at or above it hold `top_p` of the mass, [batch]."""
    goal = jnp.minimum(top_p, 1.0) * jnp.sum(p, axis=-1)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(z >= middle[:, None], p, 0.0), axis=-1) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.full(z.shape[:1], -64.0)
    low, _ = lax.fori_loop(0, 32, halve, (low, jnp.zeros_like(low)))
    return jnp.where(top_p < 1.0, low, -jnp.inf)


def _invert(p: Array, uniform: Array, block: int = 256) -> Array:
    """The id at which the running sum of `p` [batch, vocab] passes `uniform` times its total, [batch] int32."""
    batch, vocab = p.shape
    p = jnp.pad(p, ((0, 0), (0, -vocab % block))).reshape(batch, -1, block)
    sums = jnp.sum(p, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    goal = uniform * running[:, -1]

    def first_above(running: Array, mass: Array, goal: Array) -> Array:
        # Rounding can leave `goal` at the total: then the last entry that has any mass.
        last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
        return jnp.minimum(jnp.sum(running <= goal[:, None], axis=-1), last)

    i = first_above(running, sums, goal)
    goal = goal - (jnp.take_along_axis(running - sums, i[:, None], axis=-1)[:, 0])
    inside = jnp.take_along_axis(p, i[:, None, None], axis=1)[:, 0]
    j = first_above(jnp.cumsum(inside, axis=-1), inside, goal)
    return i * block + j


def _advance(
    params: Params, cache: Cache, rows: Rows, config: Config, window: int | None
) -> tuple[Array, Cache]:
    """Hidden states [batch, time, width] of the new tokens, and the cache with them in it."""
    batch, time = rows.tokens.shape
    positions = rows.start[:, None] + jnp.arange(time)
    attend = _attend_by_row(cache, rows) if window is None else _attend_batched(cache, rows, window)
    hidden, new = forward(params, config, rows.tokens, positions, attend, jnp.arange(config.layers))

    def write(i: Array, cache: Cache) -> Cache:
        at = (0, rows.rows[i], 0, rows.start[i], 0)
        k, v = (lax.dynamic_slice_in_dim(x, i, 1, axis=1) for x in new)
        return Cache(lax.dynamic_update_slice(cache.k, k, at), lax.dynamic_update_slice(cache.v, v, at))

    return hidden, lax.fori_loop(0, batch, write, cache)


def _attention(q: Array, past: Cache, new: Cache, start: Array) -> Array:
    """Queries [kv, group, time, hd] over `past` [kv, window, hd] (its first `start` valid) and, causally,
    `new` [kv, time, hd]; softmax in float32."""
    time, window = q.shape[2], past.k.shape[1]
    scale = q.shape[-1] ** -0.5
    f32 = jnp.float32
    old_scores = jnp.einsum("kgtd,kwd->kgtw", q, past.k, preferred_element_type=f32) * scale
    new_scores = jnp.einsum("kgtd,kwd->kgtw", q, new.k, preferred_element_type=f32) * scale
    scores = jnp.concatenate(
        [
            jnp.where(jnp.arange(window) < start, old_scores, -jnp.inf),
            jnp.where(jnp.tri(time, dtype=bool), new_scores, -jnp.inf),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    old_weights, new_weights = weights[..., :window], weights[..., window:]
    return jnp.einsum("kgtw,kwd->kgtd", old_weights, past.v) + jnp.einsum(
        "kgtw,kwd->kgtd", new_weights, new.v
    )


def _by_kv_head(q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
    """q [b,t,heads,hd] -> [b,kv,group,t,hd]; k and v [b,t,kv,hd] -> [b,kv,t,hd]."""
    b, t, heads, hd = q.shape
    kv = k.shape[2]
    grouped = q.reshape(b, t, kv, heads // kv, hd).transpose(0, 2, 3, 1, 4)
    return grouped, Cache(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))


def _by_time(out: Array) -> Array:
    """[b,kv,group,t,hd] -> [b,t,heads,hd]."""
    b, kv, group, t, hd = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, kv * group, hd)


def _attend_by_row(cache: Cache, rows: Rows) -> Attend:
    """Each row over its own window."""
    _, _, heads, positions, dim = cache.k.shape
    sizes = windows(positions)

    def over(size: int, layer: Array, row: Array, start: Array, q: Array, new: Cache) -> Array:
        at, shape = (layer, row, 0, 0, 0), (1, 1, heads, size, dim)
        past = Cache(lax.dynamic_slice(cache.k, at, shape)[0, 0], lax.dynamic_slice(cache.v, at, shape)[0, 0])
        return _attention(q, past, new, start)

    def attend(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Cache]:
        q, new = _by_kv_head(q, k, v)

        def one(xs: tuple[Array, Cache, Array, Array]) -> Array:
            q, new, row, start = xs
            branch = jnp.sum(start > jnp.array(sizes[:-1]))
            out: Array = lax.switch(branch, [partial(over, s) for s in sizes], layer, row, start, q, new)
            return out

        return _by_time(lax.map(one, (q, new, rows.rows, rows.start))), new

    return attend


def _attend_batched(cache: Cache, rows: Rows, window: int) -> Attend:
    """All rows over the same window."""

    def attend(q: Array, k: Array, v: Array, layer: Array) -> tuple[Array, Cache]:
        q, new = _by_kv_head(q, k, v)
        past = Cache(cache.k[layer, rows.rows, :, :window], cache.v[layer, rows.rows, :, :window])
        return _by_time(jax.vmap(_attention)(q, past, new, rows.start)), new

    return attend
