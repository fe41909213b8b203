"""The model against itself, against numpy, and against transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nexactor.learner.model import (
    Config,
    Params,
    RopeScaling,
    attend_with,
    causal_attend,
    forward,
    get,
    init,
    logits,
    nest,
    token_log_probs,
    weight_table,
)
from nexactor.learner.tiny import tiny_tokenizer
from nexactor.learner.weights import Policy, save_policy

CONFIG = Config(vocab=443, width=48, layers=3, heads=6, kv_heads=2, head_dim=8, ff=96, max_positions=512)
FAMILIES = {
    "llama": CONFIG,
    "llama untied": replace(CONFIG, tied=False),
    "llama with head_dim of its own": replace(CONFIG, head_dim=16),
    "llama rope linear": replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0)),
    "llama 3.1 rope": replace(CONFIG, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
    "qwen2": replace(CONFIG, qkv_bias=True, rms_eps=1e-6),
    "qwen3": replace(CONFIG, qk_norm=True, head_dim=16),
}


def random_params(config: Config, seed: int = 0) -> Params:
    """Random weights in which norms and biases matter too."""
    random = np.random.default_rng(seed)
    params: Params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    table = {w.path: w for w in weight_table(config)}

    def draw(path: str, shape: tuple[int, ...]) -> jax.Array:
        mean = 1.0 if table[path].init == "ones" else 0.0
        return jnp.asarray(random.normal(mean, 0.15, shape), jnp.float32)

    return nest({path: draw(path, get(params, path).shape) for path in table})


def tokens_and_positions(batch: int, time: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(seed), (batch, time), 3, CONFIG.vocab)
    return tokens, jnp.broadcast_to(jnp.arange(time), (batch, time))


@partial(jax.jit, static_argnums=1)
def all_hidden(params: Params, config: Config, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return forward(params, config, tokens, positions, causal_attend)[0]


@partial(jax.jit, static_argnums=1)
def all_logits(params: Params, config: Config, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return logits(params, config, all_hidden(params, config, tokens, positions))


@pytest.mark.torch_required
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]
    params = random_params(config)
    save_policy(Policy(params, config, tiny_tokenizer(), family), tmp_path / "policy")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    tokens, positions = tokens_and_positions(2, 33)

    out = theirs(torch.tensor(np.asarray(tokens))).logits

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients(params: Params) -> tuple[jax.Array, jax.Array]:
        hidden, _ = forward(params, config, tokens, positions, causal_attend)
        logprob, _ = token_log_probs(params, config, hidden[:, :-1], tokens[:, 1:], chunk=24)
        return -jnp.mean(logprob), logits(params, config, hidden)

    grads, ours = gradients(params)
    assert np.abs(np.asarray(ours) - out.detach().numpy()).max() < 1e-4
    goal = torch.tensor(np.asarray(tokens[:, 1:])).long().reshape(-1)
    torch.nn.functional.cross_entropy(out[:, :-1].reshape(-1, config.vocab), goal).backward()
    weights = dict(theirs.named_parameters())
    for w in weight_table(config):
        mine = np.asarray(get(grads, w.path))
        names = [w.hf_name.format(layer=i) for i in range(config.layers)] if w.stacked else [w.hf_name]
        other = [weights[n].grad.numpy() for n in names]
        other = [g.T if w.transpose else g for g in other]
        reference = np.stack(other) if w.stacked else other[0]
        assert np.abs(mine - reference).max() <= 1e-4 * np.abs(reference).max(), w.path


@pytest.mark.torch_required
def test_logits_equal_transformers_on_the_real_smollm2(smollm2: Policy, smollm2_file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    )
    ids = smollm2.tokenizer.encode(
        "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n17 + 25 = 42. Anything else?<|im_end|>"
    )
    with torch.no_grad():
        reference = theirs(torch.tensor([ids])).logits[0].numpy()
    ours = all_logits(smollm2.params, smollm2.config, jnp.asarray([ids]), jnp.arange(len(ids))[None])
    assert np.abs(np.asarray(ours[0]) - reference).max() <= 1e-3


@pytest.mark.parametrize("chunk", [7, 24, 1000])
def test_log_probs_and_entropy_in_chunks_equal_those_from_all_logits(chunk: int) -> None:
    params = random_params(CONFIG)
    hidden = jax.random.normal(jax.random.key(3), (2, 12, CONFIG.width))
    targets = jax.random.randint(jax.random.key(4), (2, 12), 0, CONFIG.vocab)
    weight = jax.random.normal(jax.random.key(5), (2, 2, 12))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def in_chunks(params: Params, hidden: jax.Array) -> tuple[jax.Array, Any]:
        scores = token_log_probs(params, CONFIG, hidden, targets, chunk=chunk)
        return jnp.sum(scores[0] * weight[0] + scores[1] * weight[1]), scores

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def at_once(params: Params, hidden: jax.Array) -> tuple[jax.Array, Any]:
        p = jax.nn.log_softmax(logits(params, CONFIG, hidden))
        scores = jnp.take_along_axis(p, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(p) * p, -1)
        return jnp.sum(scores[0] * weight[0] + scores[1] * weight[1]), scores

    ours, reference = jax.tree.leaves(in_chunks(params, hidden)), jax.tree.leaves(at_once(params, hidden))
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_logits_of_all_tokens_are_never_in_memory() -> None:
    config = replace(CONFIG, vocab=8_000)
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    hidden = jax.ShapeDtypeStruct((4096, config.width), jnp.float32)
    targets = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def loss(params: Params, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logprob, entropy = token_log_probs(params, config, hidden, targets, chunk=64)
        return jnp.mean(logprob + entropy)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, targets).compile()
    every_logit = 4096 * config.vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < every_logit / 4


def test_packed_sequences_under_a_mask_do_not_see_each_other() -> None:
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(1, 20)
    segment = np.array([0] * 12 + [1] * 8)
    mask = np.tri(20, dtype=bool) & (segment[:, None] == segment[None, :])
    packed_positions = jnp.concatenate([jnp.arange(12), jnp.arange(8)])[None]
    attend = attend_with(jnp.asarray(mask)[None, None])
    packed = jax.jit(lambda: forward(params, CONFIG, tokens, packed_positions, attend)[0])()
    for part in (slice(0, 12), slice(12, 20)):
        length = part.stop - part.start
        alone = all_hidden(params, CONFIG, tokens[:, part], positions[:, :length])
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache_equals_the_whole_sequence() -> None:
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(2, 9)
    whole = all_hidden(params, CONFIG, tokens, positions)

    @jax.jit
    def step(t: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, kept: Any) -> tuple[jax.Array, Any]:
            keys, values = kept[0].at[:, t].set(k[:, 0]), kept[1].at[:, t].set(v[:, 0])
            mask = (jnp.arange(9) <= t)[None, None, None]
            return jax.nn.dot_product_attention(q, keys, values, mask=mask), (keys, values)

        return forward(params, CONFIG, tokens[:, t][:, None], positions[:, t][:, None], attend, cache)

    empty = jnp.zeros((CONFIG.layers, 2, 9, CONFIG.kv_heads, CONFIG.head_dim))
    cache: Any = (empty, empty)
    for t in range(9):
        hidden, cache = step(jnp.asarray(t), cache)
        np.testing.assert_allclose(hidden[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


def test_recomputing_blocks_changes_no_value_and_no_gradient() -> None:
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(1, 16)

    @partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def loss(params: Params, remat: bool) -> jax.Array:
        hidden, _ = forward(params, CONFIG, tokens, positions, causal_attend, remat=remat)
        return jnp.mean(hidden**2)

    kept, again = loss(params, False), loss(params, True)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_stays_near_float32_and_scores_in_float32() -> None:
    params = random_params(CONFIG)
    tokens, positions = tokens_and_positions(1, 16)
    half = replace(CONFIG, dtype="bfloat16")
    hidden = all_hidden(params, half, tokens, positions)
    scores = all_logits(params, half, tokens, positions)
    assert hidden.dtype == jnp.bfloat16
    assert scores.dtype == jnp.float32
    reference = all_logits(params, CONFIG, tokens, positions)
    assert jnp.abs(scores - reference).max() < 0.05 * jnp.abs(reference).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_weight_with_its_shape(family: str) -> None:
    config = FAMILIES[family]
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    table = weight_table(config)
    assert len(jax.tree.leaves(params)) == len(table)
    for w in table:
        assert get(params, w.path).shape == ((config.layers, *w.shape) if w.stacked else w.shape)
        assert len(w.axes) == len(w.shape)


def test_an_unknown_rope_scaling_is_refused() -> None:
    config = replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0))
    tokens, positions = tokens_and_positions(1, 4)
    with pytest.raises(ValueError, match="yarn"):
        forward(random_params(CONFIG), config, tokens, positions, causal_attend)
