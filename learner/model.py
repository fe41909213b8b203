"""The policy: a Llama-family decoder as pure functions over a dictionary of arrays. Read it top to bottom.

`weight_table` states every weight once (shape, named axes, Hugging Face name); initialisation, safetensors
I/O and sharding all derive from it. Layers are stacked on axis 0 and scanned, so a model compiles in the time
of one layer. Attention is a callback: training, decoding with a cache and tree masks share this file, so
the sampler's and the learner's log-probabilities come from the same code.

Covers Llama (and SmolLM2, Mistral without windows) and, by two flags, the dense Qwen2 (QKV bias) and Qwen3
(QK norm). Left out: mixture of experts, sliding windows, dropout, attention sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Params = dict[str, Any]
"""`{"embed", "final_norm", ["head"], "layers": {name: [layers, ...]}}`, see `weight_table`."""

Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""(q [b,t,heads,hd], k [b,t,kv_heads,hd], v [b,t,kv_heads,hd], cache) -> (out [b,t,heads,hd], new cache)."""


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the context a model was first trained on.

    `kind` is "linear" (all frequencies divided by `factor`) or "llama3" (long wavelengths only, as in Llama
    3.1; `transformers.modeling_rope_utils._compute_llama3_parameters`).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class Config:
    """Shape and constants of a model; hashable, so it can be a static argument of `jax.jit`."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-5
    tied: bool = True
    max_positions: int = 8192
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: str = "float32"
    """Compute dtype of the products. Weights keep theirs; norms, softmax and log-probabilities are float32."""


@dataclass(frozen=True)
class Weight:
    """One row of the table: a weight of `params`, and where Hugging Face files keep it.

    `path` is where it lives in `params` ("layers/q" means `params["layers"]["q"]`). `shape` excludes the
    leading layer axis; `axes` names its axes for sharding. `hf_name` has `{layer}` for stacked weights.
    `transpose` says that Hugging Face stores [out, in] where we keep [in, out].
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    transpose: bool = False
    init: str = "normal"

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")


def weight_table(config: Config) -> tuple[Weight, ...]:
    """All weights of a model of this config, in the order in which they are initialised and written."""
    c = config
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    block, attn = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
    mlp, norm2 = block + "mlp.", block + "post_attention_layernorm.weight"
    rows = [
        Weight("embed", (c.vocab, c.width), ("vocab", "embed"), "model.embed_tokens.weight"),
        Weight("layers/attn_norm", (c.width,), ("embed",), block + "input_layernorm.weight", init="ones"),
        Weight("layers/q", (c.width, q), ("embed", "heads"), attn + "q_proj.weight", True),
        Weight("layers/k", (c.width, kv), ("embed", "kv_heads"), attn + "k_proj.weight", True),
        Weight("layers/v", (c.width, kv), ("embed", "kv_heads"), attn + "v_proj.weight", True),
        Weight("layers/o", (q, c.width), ("heads", "embed"), attn + "o_proj.weight", True),
        Weight("layers/ff_norm", (c.width,), ("embed",), norm2, init="ones"),
        Weight("layers/gate", (c.width, c.ff), ("embed", "ff"), mlp + "gate_proj.weight", True),
        Weight("layers/up", (c.width, c.ff), ("embed", "ff"), mlp + "up_proj.weight", True),
        Weight("layers/down", (c.ff, c.width), ("ff", "embed"), mlp + "down_proj.weight", True),
        Weight("final_norm", (c.width,), ("embed",), "model.norm.weight", init="ones"),
    ]
    if c.qkv_bias:
        rows += [
            Weight("layers/q_bias", (q,), ("heads",), attn + "q_proj.bias", init="zeros"),
            Weight("layers/k_bias", (kv,), ("kv_heads",), attn + "k_proj.bias", init="zeros"),
            Weight("layers/v_bias", (kv,), ("kv_heads",), attn + "v_proj.bias", init="zeros"),
        ]
    if c.qk_norm:
        rows += [
            Weight("layers/q_norm", (c.head_dim,), ("head_dim",), attn + "q_norm.weight", init="ones"),
            Weight("layers/k_norm", (c.head_dim,), ("head_dim",), attn + "k_norm.weight", init="ones"),
        ]
    if not c.tied:
        rows.append(Weight("head", (c.vocab, c.width), ("vocab", "embed"), "lm_head.weight"))
    return tuple(rows)


def nest(flat: dict[str, Any]) -> Params:
    """{"layers/q": x, "embed": y} -> {"layers": {"q": x}, "embed": y}."""
    params: Params = {"layers": {}}
    for path, value in flat.items():
        if path.startswith("layers/"):
            params["layers"][path.removeprefix("layers/")] = value
        else:
            params[path] = value
    return params


def get(params: Params, path: str) -> Any:
    """The leaf of `params` at a table path."""
    name = path.removeprefix("layers/")
    return params["layers"][name] if name != path else params[path]


def init(config: Config, key: Array, *, scale: float = 0.02) -> Params:
    """Random float32 weights: normal with deviation `scale`, norms one, biases zero."""
    flat = {}
    for i, w in enumerate(weight_table(config)):
        shape = (config.layers, *w.shape) if w.stacked else w.shape
        if w.init == "normal":
            flat[w.path] = scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        else:
            flat[w.path] = jnp.full(shape, 1.0 if w.init == "ones" else 0.0, jnp.float32)
    return nest(flat)


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain).astype(x.dtype)


def rope_frequencies(config: Config) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Angle per position of each pair of dimensions, [head_dim // 2], after scaling."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    freq = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    s = config.rope_scaling
    if s is None:
        return freq
    if s.kind == "linear":
        return freq / np.float32(s.factor)
    if s.kind != "llama3":
        raise ValueError(f"unknown RoPE scaling {s.kind!r}; known are 'linear' and 'llama3'")
    wavelength = 2 * math.pi / freq
    span = s.high_freq_factor - s.low_freq_factor
    smooth = np.clip((s.original_positions / wavelength - s.low_freq_factor) / span, 0.0, 1.0)
    return ((1 - smooth) * freq / s.factor + smooth * freq).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE (arXiv 2104.09864), Hugging Face's half-split layout: x [b,t,heads,hd], cos, sin [b,t,1,hd//2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def forward(
    params: Params,
    config: Config,
    tokens: Array,
    positions: Array,
    attend: Attend,
    cache: Any = None,
    *,
    remat: bool = False,
    unroll: int = 1,
) -> tuple[Array, Any]:
    """Final hidden states (after the last norm), [batch, time, width] in `config.dtype`, and the new cache.

    `tokens`, `positions`: [batch, time] int32. Every leaf of `cache` has the layers on axis 0: one slice is
    given to each layer's `attend`, and what those return is stacked again. `remat` recomputes a block's
    inside in the backward pass instead of keeping it; `unroll` is passed to `lax.scan`.
    """
    c, dtype = config, jnp.dtype(config.dtype)
    batch, time = tokens.shape
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(c)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def block(x: Array, layer: tuple[Params, Any]) -> tuple[Array, Any]:
        w, layer_cache = layer
        w = {n: a if n.endswith("norm") else a.astype(dtype) for n, a in w.items()}
        h = rms_norm(x, w["attn_norm"], c.rms_eps)
        q, k, v = h @ w["q"], h @ w["k"], h @ w["v"]
        if c.qkv_bias:
            q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
        q = q.reshape(batch, time, c.heads, c.head_dim)
        k = k.reshape(batch, time, c.kv_heads, c.head_dim)
        v = v.reshape(batch, time, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = rms_norm(q, w["q_norm"], c.rms_eps), rms_norm(k, w["k_norm"], c.rms_eps)
        out, layer_cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layer_cache)
        x = x + out.reshape(batch, time, -1) @ w["o"]
        h = rms_norm(x, w["ff_norm"], c.rms_eps)
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], layer_cache

    x = params["embed"][tokens].astype(dtype)
    step = jax.checkpoint(block) if remat else block
    x, cache = lax.scan(step, x, (params["layers"], cache), unroll=unroll)
    return rms_norm(x, params["final_norm"], c.rms_eps), cache


def attend_with(mask: Array) -> Attend:
    """Attention under a boolean mask, broadcastable to [batch, heads or 1, time, source]: True = may look.

    Allow every query at least one key (let padding look at itself), or its output is the mean of all values.
    """

    def attend(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask), cache

    return attend


def causal_attend(q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
    """Plain causal attention over one unpacked sequence a row."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), cache


def head(params: Params) -> Array:
    """The output matrix, [vocab, width]: the embedding itself where the model ties them."""
    weight: Array = params["head"] if "head" in params else params["embed"]
    return weight


def logits(params: Params, config: Config, hidden: Array) -> Array:
    """Unnormalised scores, [..., vocab] float32, of hidden states [..., width]."""
    weight = head(params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


def token_log_probs(
    params: Params, config: Config, hidden: Array, targets: Array, *, chunk: int = 512
) -> tuple[Array, Array]:
    """Log-probability of each target and entropy of its distribution, both [...] float32.

    `hidden` [..., width] predicts `targets` [...] int32. Logits exist for `chunk` tokens at a time only,
    forward and backward. The head is a large part of a small model: gather the positions that carry loss
    before calling this (a flat [tokens, width] will do). Divide `hidden` by a temperature to score under it.
    """
    flat, goal = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    count = flat.shape[0]
    size = min(chunk, count)
    pad = -count % size
    if pad:
        flat, goal = jnp.pad(flat, ((0, pad), (0, 0))), jnp.pad(goal, (0, pad))
    weight = head(params).astype(hidden.dtype)
    logprob, entropy = _scores(weight, flat.reshape(-1, size, flat.shape[-1]), goal.reshape(-1, size))
    shape = targets.shape
    return logprob.reshape(-1)[:count].reshape(shape), entropy.reshape(-1)[:count].reshape(shape)


def _chunk_logits(weight: Array, hidden: Array) -> Array:
    return jnp.einsum("td,vd->tv", hidden, weight, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _scores(weight: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
    return _scores_forward(weight, hidden, targets)[0]


def _scores_forward(weight: Array, hidden: Array, targets: Array) -> tuple[tuple[Array, Array], Any]:
    def one(h_and_y: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        h, y = h_and_y
        z = _chunk_logits(weight, h)
        lse = jax.nn.logsumexp(z, axis=-1)
        chosen = jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]
        mean = jnp.sum(jnp.exp(z - lse[:, None]) * z, axis=-1)
        return chosen - lse, lse - mean, lse

    logprob, entropy, lse = lax.map(one, (hidden, targets))
    return (logprob, entropy), (weight, hidden, targets, lse, entropy)


def _scores_backward(saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    # d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy). The logits are computed again.
    weight, hidden, targets, lse, entropy = saved

    def one(grad: Array, xs: Any) -> tuple[Array, Array]:
        h, y, norm, ent, d_lp, d_ent = xs
        log_p = _chunk_logits(weight, h) - norm[:, None]
        dz = -jnp.exp(log_p) * (d_lp[:, None] + d_ent[:, None] * (log_p + ent[:, None]))
        dz = jnp.where(jnp.arange(dz.shape[1]) == y[:, None], dz + d_lp[:, None], dz).astype(h.dtype)
        grad = grad + jnp.einsum("tv,td->vd", dz, h, preferred_element_type=jnp.float32)
        return grad, jnp.einsum("tv,vd->td", dz, weight, preferred_element_type=jnp.float32).astype(h.dtype)

    zero = jnp.zeros(weight.shape, jnp.float32)
    grad, d_hidden = lax.scan(one, zero, (hidden, targets, lse, entropy, *cotangents))
    return grad.astype(weight.dtype), d_hidden, None


_scores.defvjp(_scores_forward, _scores_backward)
