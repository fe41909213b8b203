"""The loss of a pack: a sum of terms, each with a weight for every target and its own normaliser.

The trainer knows no algorithms. Supervised fine-tuning writes `ce` weights; policy gradients and distillation
(issue "The learner") will add `rl` and `kl` terms beside it, from the same log-probabilities of one pass.
Metrics are sums, not means, so that packs of one step add up exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from nexactor.learner.attention import tree_attend
from nexactor.learner.model import Config, Params, forward, token_log_probs
from nexactor.learner.pack import Pack


class PackArrays(NamedTuple):
    """A pack on the device; fields and shapes as in `pack.Pack`."""

    tokens: Array
    positions: Array
    end: Array
    source: Array
    target: Array
    weight: Array
    blocks: Array


class LossSums(NamedTuple):
    """Sums over a pack's targets; divide by `weight` for means. All float32 scalars."""

    ce: Array
    entropy: Array
    confident: Array
    weight: Array


def pack_arrays(pack: Pack) -> PackArrays:
    """The arrays of a pack, moved to the default device."""
    return PackArrays(*(jnp.asarray(getattr(pack, name)) for name in PackArrays._fields))


def pack_loss(
    params: Params, config: Config, pack: PackArrays, normaliser: Any, *, remat: bool = False
) -> tuple[Array, LossSums]:
    """Weighted cross-entropy of a pack's targets divided by `normaliser`, and the sums behind it.

    `normaliser` is the total weight of the whole step, over all its packs: gradients of packs then just add
    up.
    """
    hidden, _ = forward(
        params,
        config,
        pack.tokens[None],
        pack.positions[None],
        tree_attend(pack.end, pack.blocks),
        remat=remat,
    )
    predicted_by = hidden[0][pack.source]
    logprob, entropy = token_log_probs(params, config, predicted_by, pack.target)
    ce = -jnp.sum(pack.weight * logprob)
    sums = LossSums(
        ce=ce,
        entropy=jnp.sum(pack.weight * entropy),
        # A probability above one half is certainly the greedy choice; counting only those costs no second
        # pass.
        confident=jnp.sum(pack.weight * (logprob > jnp.log(0.5))),
        weight=jnp.sum(pack.weight),
    )
    return ce / normaliser, sums
