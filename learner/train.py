"""Gradient steps: state, optimiser, and a step over the packs of a batch.

A step accumulates the gradients of its packs, each divided by the step's total weight, then updates once.
Shapes are bucketed (pack.py), so after a few steps nothing compiles any more; `Trainer.compiled` counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from nexactor.learner.data import Sample
from nexactor.learner.loss import LossSums, PackArrays, pack_arrays, pack_loss
from nexactor.learner.model import Config, Params
from nexactor.learner.pack import BLOCK, pack
from nexactor.learner.rules import OptimizerConfig


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt", "step", "rng"], meta_fields=[])
@dataclass
class TrainState:
    """Everything a step changes. `step` counts finished steps; `rng` is raw key data, uint32 [2]."""

    params: Params
    opt: Any
    step: Array
    rng: Array


@dataclass(frozen=True)
class StepMetrics:
    """One step's numbers: `loss` and `entropy` are means over the trained weight, in nats a token.

    `confident` is the share of targets that the policy gave more than half of its probability. `tokens`
    counts all branches in full, `unique` what was computed; `seconds` is the step's own time.
    """

    loss: float
    entropy: float
    confident: float
    grad_norm: float
    lr: float
    trained: float
    tokens: int
    unique: int
    packs: int
    fill: float
    compiled: int
    seconds: float


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step number."""
    warm = optax.linear_schedule(config.lr / max(config.warmup, 1), config.lr, max(config.warmup - 1, 1))
    rest = max(config.decay_steps - config.warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, rest),
    }[config.decay]()
    return after if config.warmup == 0 else optax.join_schedules([warm, after], [config.warmup])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimiser of a config."""

    def decayed(params: Params) -> Any:
        # Only products are decayed: norms and biases are vectors, on top of the stacked layer axis.
        def is_matrix(path: Any, leaf: Any) -> bool:
            stacked = any(getattr(k, "key", None) == "layers" for k in path)
            return bool(leaf.ndim - stacked >= 2)

        return jax.tree_util.tree_map_with_path(is_matrix, params)

    adamw = optax.adamw(
        schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw


@cache
def _compiled(model: Config, optimizer: OptimizerConfig, remat: bool) -> tuple[Any, Any, Any]:
    """The jitted functions of a trainer; trainers of the same kind in one process share them."""
    rule = make_optimizer(optimizer)

    def gradient(params: Params, arrays: PackArrays, normaliser: Array) -> tuple[LossSums, Params]:
        (_, sums), grads = jax.value_and_grad(pack_loss, has_aux=True)(
            params, model, arrays, normaliser, remat=remat
        )
        return sums, grads

    def add(total: Any, more: Any) -> Any:
        return jax.tree.map(jnp.add, total, more)

    def update(state: TrainState, grads: Params) -> tuple[TrainState, Array]:
        changes, opt = rule.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, changes)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        return TrainState(params, opt, state.step + 1, state.rng), norm

    return jax.jit(gradient), jax.jit(add, donate_argnums=(0,)), jax.jit(update, donate_argnums=(0,))


class Trainer:
    """Runs steps of one model and optimiser. Holds compiled functions only; the state is the caller's."""

    def __init__(
        self,
        model: Config,
        optimizer: OptimizerConfig,
        *,
        buckets: Sequence[int],
        remat: bool = False,
    ) -> None:
        self.model, self.buckets = model, tuple(buckets)
        self._schedule = schedule(optimizer)
        self._optimizer = make_optimizer(optimizer)
        self._shapes: set[tuple[int, int, int]] = set()
        self._gradient, self._add, self._update = _compiled(model, optimizer, remat)

    @property
    def compiled(self) -> int:
        """How many shapes of pack were compiled so far."""
        return len(self._shapes)

    def init(self, params: Params, seed: int = 0) -> TrainState:
        """A fresh state. `params` are copied: steps donate the state's buffers."""
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
        rng = jax.random.key_data(jax.random.key(seed))
        return TrainState(params, self._optimizer.init(params), jnp.zeros((), jnp.int32), rng)

    def step(self, state: TrainState, samples: Sequence[Sample]) -> tuple[TrainState, StepMetrics]:
        """One optimiser step on a batch of samples; blocks until it is done. `state` is used up."""
        begun = time.perf_counter()
        packs = pack(samples, self.buckets)
        total = float(sum(p.weight.sum() for p in packs))
        normaliser = jnp.float32(total)
        grads: Any = None
        sums: Any = None
        for one in packs:
            self._shapes.add(one.shape)
            more_sums, more = self._gradient(state.params, pack_arrays(one), normaliser)
            grads, sums = (more, more_sums) if grads is None else self._add((grads, sums), (more, more_sums))
        lr = float(self._schedule(int(state.step)))
        state, norm = self._update(state, grads)
        ce, entropy, confident, weight, norm = (float(x) for x in (*sums, norm))
        return state, StepMetrics(
            loss=ce / weight,
            entropy=entropy / weight,
            confident=confident / weight,
            grad_norm=norm,
            lr=lr,
            trained=weight,
            tokens=sum(p.total for p in packs),
            unique=sum(p.unique for p in packs),
            packs=len(packs),
            fill=sum(p.unique for p in packs) / sum(len(p.tokens) for p in packs),
            compiled=self.compiled,
            seconds=time.perf_counter() - begun,
        )


def default_buckets(max_tokens: int) -> tuple[int, ...]:
    """Pack lengths that hold samples of up to `max_tokens`: steps of an eighth of the largest, in whole blocks."""
    largest = -(-max(max_tokens, 8 * BLOCK) // (8 * BLOCK)) * 8 * BLOCK
    return tuple(largest // 8 * i for i in range(1, 9))


def keep_compiled(folder: Path) -> None:
    """Keep compiled steps in `folder`, so that a learner that starts again does not compile again.

    For the whole process, hence for a program's main function to decide. A cache that was set already stays.
    """
    settings: Any = jax.config  # not typed
    if settings.jax_compilation_cache_dir is None:
        settings.update("jax_compilation_cache_dir", str(folder))
