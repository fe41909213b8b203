"""Tree packing: the mask, the bookkeeping, and exact equality with training the branches apart."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexactor.events.errors import NexactorError
from nexactor.learner import attention
from nexactor.learner.data import Sample
from nexactor.learner.loss import pack_arrays, pack_loss
from nexactor.learner.model import Config, causal_attend, forward, init, token_log_probs
from nexactor.learner.pack import BLOCK, common_prefix, pack, tree_mask, visible_blocks

CONFIG = Config(vocab=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, ff=24)
PARAMS = init(CONFIG, jax.random.key(0), scale=0.2)
BUCKETS = (BLOCK, 4 * BLOCK)


def sample(ids: list[int], weights: list[float] | None = None, run: str = "r") -> Sample:
    w = np.ones(len(ids), np.float32) if weights is None else np.array(weights, np.float32)
    return Sample(np.array(ids, np.int32), w, np.zeros_like(w), run, f"agent/{run}", ())


@jax.jit
@jax.value_and_grad
def branch_loss(params: Any, ids: Any, weights: Any) -> Any:
    """The loss of one branch under plain causal attention; padded at its end, which no real token sees."""
    hidden, _ = forward(params, CONFIG, ids[None], jnp.arange(len(ids))[None], causal_attend)
    logprob, _ = token_log_probs(params, CONFIG, hidden[0, :-1], ids[1:])
    return -jnp.sum(logprob * weights[1:])


tree_loss = jax.jit(jax.value_and_grad(lambda params, p: pack_loss(params, CONFIG, p, 1.0)[0]))


def total(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *x: np.sum(np.stack(x, dtype=np.float64), axis=0), *parts)


def assert_equal(samples: list[Sample], buckets: tuple[int, ...] = BUCKETS, merge: bool = True) -> None:
    parts = []
    for s in samples:
        pad = (0, 128 - len(s.ids))
        parts.append(branch_loss(PARAMS, np.pad(s.ids, pad), np.pad(s.weights, pad)))
    loss, grads = total(parts)
    ours, our_grads = total([tree_loss(PARAMS, pack_arrays(p)) for p in pack(samples, buckets, merge=merge)])
    np.testing.assert_allclose(ours, loss, rtol=1e-5, atol=1e-5 * max(1.0, sum(abs(p[0]) for p in parts)))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(our_grads), strict=True
    ):
        # Branches with opposite weights may cancel: compare with the size of what was added up.
        scale = float(sum(np.abs(leaf).max() for leaf in pick(parts, path)))
        np.testing.assert_allclose(b, a, atol=1e-5 * scale, rtol=0, err_msg=str(path))


def pick(parts: list[Any], path: Any) -> list[Any]:
    return [dict(jax.tree_util.tree_leaves_with_path(grads))[path] for _, grads in parts]


@st.composite
def trees(draw: st.DrawFn) -> list[Sample]:
    """Branches that fork off each other at random depths, with random weights."""
    token = st.integers(0, 3)  # few letters, so that prefixes also meet by chance
    found: list[list[int]] = [draw(st.lists(token, min_size=2, max_size=40))]
    for _ in range(draw(st.integers(0, 5))):
        stem = draw(st.sampled_from(found))
        cut = draw(st.integers(0, len(stem)))
        found.append(stem[:cut] + draw(st.lists(token, min_size=2, max_size=40)))
    weight = st.sampled_from([0.0, 1.0, 0.5, -1.0])
    return [sample(ids, draw(st.lists(weight, min_size=len(ids), max_size=len(ids)))) for ids in found]


@settings(max_examples=25, deadline=None, database=None)
@given(samples=trees(), merge=st.booleans())
def test_loss_and_every_gradient_equal_those_of_the_branches_apart(
    samples: list[Sample], merge: bool
) -> None:
    assert_equal(samples, merge=merge)


def test_the_block_sparse_path_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(end: Any) -> Any:
        raise AssertionError("this pack must take the block-sparse path")

    monkeypatch.setattr(attention, "dense_tree_attend", refuse)
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 32, 70).tolist()
    samples = [sample(stem + rng.integers(0, 32, 40).tolist()) for _ in range(24)]
    assert_equal(samples, (20 * BLOCK,))


def test_a_shared_prefix_is_computed_once() -> None:
    stem = list(range(10))
    (one,) = pack([sample([*stem, 11, 12]), sample([*stem, 13]), sample([*stem, 11, 14])], BUCKETS)
    assert one.unique == 10 + 2 + 1 + 1
    assert one.total == 12 + 11 + 12
    assert len(one.tokens) == BLOCK


def test_the_last_token_of_a_prefix_predicts_the_first_of_every_child() -> None:
    (one,) = pack([sample([1, 2, 3], [0, 0, 1]), sample([1, 2, 4], [0, 0, 2])], BUCKETS)
    pairs = sorted(zip(one.source, one.target, one.weight, strict=True))[-2:]
    assert pairs == [(1, 3, 1.0), (1, 4, 2.0)]


def test_branches_that_train_on_the_same_token_add_up_or_stay_apart() -> None:
    samples = [sample([1, 2, 3], [0, 1, 0]), sample([1, 2, 4], [0, 3, 0])]
    (merged,) = pack(samples, BUCKETS)
    (separate,) = pack(samples, BUCKETS, merge=False)
    assert sorted(merged.weight[merged.weight > 0]) == [4.0]
    assert sorted(separate.weight[separate.weight > 0]) == [1.0, 3.0]


def test_the_mask_lets_a_token_see_its_ancestors_and_nothing_else() -> None:
    (one,) = pack([sample([1, 2, 3]), sample([1, 2, 4]), sample([5, 6])], BUCKETS)
    seen = tree_mask(one.end)[:6, :6].astype(int).tolist()
    assert one.tokens[:6].tolist() == [1, 2, 3, 4, 5, 6]
    assert one.positions[:6].tolist() == [0, 1, 2, 2, 0, 1]
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@settings(max_examples=30, deadline=None, database=None)
@given(samples=trees())
def test_visible_blocks_cover_every_pair_that_the_mask_allows(samples: list[Sample]) -> None:
    for one in pack(samples, BUCKETS):
        blocks = visible_blocks(one.end)
        for q, k in np.argwhere(tree_mask(one.end)):
            assert k // BLOCK in blocks[q // BLOCK]


def test_a_batch_beyond_the_largest_bucket_becomes_several_packs() -> None:
    samples = [sample([i % 32, *range(30)], run=str(i)) for i in range(20)]
    packs = pack(samples, BUCKETS)
    assert len(packs) == 3
    assert sorted(i for p in packs for i in p.samples) == list(range(20))
    assert all(p.unique <= BUCKETS[-1] for p in packs)


def test_the_order_of_equal_samples_does_not_change_a_pack() -> None:
    a, b = sample([1, 2, 3]), sample([1, 2, 4, 5])
    (one,), (two,) = pack([a, b], BUCKETS), pack([b, a], BUCKETS)
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.weight, two.weight)


def test_a_sample_longer_than_the_largest_bucket_is_refused_with_what_to_change() -> None:
    with pytest.raises(NexactorError, match="max_tokens"):
        pack([sample(list(range(32)) * 20)], BUCKETS)


def test_common_prefix_counts_leading_equal_ids() -> None:
    assert common_prefix(np.array([1, 2, 3], np.int32), np.array([1, 2], np.int32)) == 2
    assert common_prefix(np.array([1, 2], np.int32), np.array([3], np.int32)) == 0
