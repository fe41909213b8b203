"""Steps: packs of a batch add up to one update, the optimiser is the stated one, nothing compiles twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nexactor.learner.data import Sample
from nexactor.learner.model import Config, init
from nexactor.learner.pack import BLOCK
from nexactor.learner.rules import OptimizerConfig
from nexactor.learner.train import Trainer, default_buckets, keep_compiled, make_optimizer, schedule

CONFIG = Config(vocab=64, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ff=24)


def samples(count: int, length: int = 30, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        weights = np.zeros(length, np.float32)
        weights[length // 2 :] = 1
        ids = rng.integers(0, 64, length).astype(np.int32)
        out.append(Sample(ids, weights, np.zeros_like(weights), f"r{i}", f"agent/r{i}", ()))
    return out


def test_a_batch_in_several_packs_gives_the_step_of_one_pack() -> None:
    params = init(CONFIG, jax.random.key(0), scale=0.2)
    small = Trainer(CONFIG, OptimizerConfig(clip=0.0), buckets=(2 * BLOCK,))
    large = Trainer(CONFIG, OptimizerConfig(clip=0.0), buckets=(8 * BLOCK,))
    many, m = small.step(small.init(params), samples(12))
    one, o = large.step(large.init(params), samples(12))
    assert (m.packs, o.packs) == (3, 1)
    np.testing.assert_allclose(m.loss, o.loss, rtol=1e-6)
    np.testing.assert_allclose(m.grad_norm, o.grad_norm, rtol=1e-5)
    # AdamW's first step has the size of the learning rate wherever there is a gradient: compare the moments.
    for a, b in zip(jax.tree.leaves(many.opt), jax.tree.leaves(one.opt), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(a).max()), 1e-30))


def test_the_loss_falls_on_a_repeated_batch_and_shapes_compile_once() -> None:
    trainer = Trainer(CONFIG, OptimizerConfig(lr=1e-2, warmup=2), buckets=(4 * BLOCK,))
    state = trainer.init(init(CONFIG, jax.random.key(0)))
    losses = []
    for _ in range(20):
        state, metrics = trainer.step(state, samples(4))
        losses.append(metrics.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.compiled == 1
    assert int(state.step) == 20


def test_a_step_leaves_the_given_parameters_usable() -> None:
    params = init(CONFIG, jax.random.key(0))
    trainer = Trainer(CONFIG, OptimizerConfig(), buckets=(BLOCK,))
    trainer.step(trainer.init(params), samples(1))
    assert np.isfinite(np.asarray(params["embed"])).all()


def test_a_step_is_bit_identical_when_repeated() -> None:
    params = init(CONFIG, jax.random.key(0))
    trainer = Trainer(CONFIG, OptimizerConfig(), buckets=(4 * BLOCK,))
    first, _ = trainer.step(trainer.init(params), samples(5))
    second, _ = trainer.step(trainer.init(params), samples(5))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_learning_rate_warms_up_from_the_first_step() -> None:
    rate = schedule(OptimizerConfig(lr=1.0, warmup=4))
    assert [round(float(rate(i)), 6) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_learning_rate_falls_to_nothing_at_its_last_step(decay: str) -> None:
    rate = schedule(OptimizerConfig(lr=1.0, warmup=2, decay=decay, decay_steps=10))  # type: ignore[arg-type]
    assert float(rate(2)) == 1.0
    assert 0 < float(rate(8)) < 0.5
    assert abs(float(rate(10))) < 1e-6


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    assert float(schedule(OptimizerConfig(lr=1.0, warmup=0))(0)) == 1.0


def test_weight_decay_spares_norms() -> None:
    params = init(CONFIG, jax.random.key(0))
    rule = make_optimizer(OptimizerConfig(lr=1.0, warmup=0, weight_decay=0.1))
    grads = jax.tree.map(jnp.zeros_like, params)
    changes, _ = rule.update(grads, rule.init(params), params)
    assert float(jnp.abs(changes["layers"]["attn_norm"]).max()) == 0
    assert float(jnp.abs(changes["final_norm"]).max()) == 0
    np.testing.assert_allclose(changes["layers"]["q"], -0.1 * params["layers"]["q"], rtol=1e-6)
    np.testing.assert_allclose(changes["embed"], -0.1 * params["embed"], rtol=1e-6)


def test_default_buckets_hold_the_longest_sample_in_whole_blocks() -> None:
    buckets = default_buckets(2000)
    assert buckets[-1] >= 2000
    assert all(b % BLOCK == 0 for b in buckets)


def test_compiled_steps_are_kept_where_told_unless_the_user_chose_a_place(tmp_path: Path) -> None:
    settings: Any = jax.config
    before = settings.jax_compilation_cache_dir
    try:
        settings.update("jax_compilation_cache_dir", None)
        keep_compiled(tmp_path / "a")
        keep_compiled(tmp_path / "b")
        assert settings.jax_compilation_cache_dir == str(tmp_path / "a")
    finally:
        settings.update("jax_compilation_cache_dir", before)
