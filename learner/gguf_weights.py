"""A policy out of one GGUF file: metadata to config and tokenizer, quantised blocks to float32.

GGUF stores the rows of the query and key projections of Llama models in pairs, for llama.cpp's interleaved RoPE
(`convert_hf_to_gguf.py`, LlamaModel.permute); `_unpermute` restores Hugging Face's half-split order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nexactor.events.errors import ConfigError
from nexactor.learner.model import Config, nest, weight_table
from nexactor.learner.tokenizer import PolicyTokenizer
from nexactor.learner.weights import Policy, check_vocab

_NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers/attn_norm": "blk.{layer}.attn_norm.weight",
    "layers/q": "blk.{layer}.attn_q.weight",
    "layers/k": "blk.{layer}.attn_k.weight",
    "layers/v": "blk.{layer}.attn_v.weight",
    "layers/o": "blk.{layer}.attn_output.weight",
    "layers/ff_norm": "blk.{layer}.ffn_norm.weight",
    "layers/gate": "blk.{layer}.ffn_gate.weight",
    "layers/up": "blk.{layer}.ffn_up.weight",
    "layers/down": "blk.{layer}.ffn_down.weight",
    "layers/q_bias": "blk.{layer}.attn_q.bias",
    "layers/k_bias": "blk.{layer}.attn_k.bias",
    "layers/v_bias": "blk.{layer}.attn_v.bias",
    "layers/q_norm": "blk.{layer}.attn_q_norm.weight",
    "layers/k_norm": "blk.{layer}.attn_k_norm.weight",
}
_FAMILIES = ("llama", "qwen2", "qwen3")


def load_gguf(path: Path) -> Policy:
    """Read a policy from a .gguf file. Raises ConfigError that names the file and what is wrong with it."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{path}: not a readable GGUF file ({error}); fetch the policy again") from error
    tensors = {t.name: t for t in reader.tensors}
    config = _config(fields, tensors, path)
    tokenizer = PolicyTokenizer.from_gguf(fields, str(path))
    check_vocab(config, tokenizer, path)
    permuted = {"layers/q": config.heads, "layers/k": config.kv_heads} if _family(fields) == "llama" else {}

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if name not in tensors:
            raise ConfigError(
                f"{path}: has no tensor {name!r}; the file is damaged or of another architecture"
            )
        t = tensors[name]
        value = dequantize(t.data, t.tensor_type).astype(np.float32, copy=False)
        if value.shape != shape:
            raise ConfigError(f"{path}: {name} has shape {value.shape}, its metadata say {shape}")
        return value

    flat: dict[str, Any] = {}
    for w in weight_table(config):
        shape = w.shape[::-1] if w.transpose else w.shape
        if not w.stacked:
            flat[w.path] = jnp.asarray(tensor(_NAMES[w.path], shape))
            continue
        stack = np.empty((config.layers, *w.shape), np.float32)
        for layer in range(config.layers):
            value = tensor(_NAMES[w.path].format(layer=layer), shape)
            if w.path in permuted:
                value = _unpermute(value, permuted[w.path])
            stack[layer] = value.T if w.transpose else value
        flat[w.path] = jnp.asarray(stack)
    return Policy(nest(flat), config, tokenizer, path.stem)


def _family(fields: dict[str, Any]) -> str:
    return str(fields.get("general.architecture"))


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> Config:
    family = _family(fields)
    if family not in _FAMILIES:
        raise ConfigError(f"{path}: architecture {family!r} is not supported; {', '.join(_FAMILIES)} are")
    if "rope_freqs.weight" in tensors or fields.get(f"{family}.rope.scaling.type", "none") != "none":
        raise ConfigError(f"{path}: RoPE scaling is not read from GGUF; use the model's Hugging Face folder")

    def value(key: str, default: Any = None) -> Any:
        got = fields.get(f"{family}.{key}", default)
        if got is None:
            raise ConfigError(f"{path}: its metadata lack {family}.{key}; fetch the policy again")
        return got

    heads, width = int(value("attention.head_count")), int(value("embedding_length"))
    return Config(
        vocab=len(fields.get("tokenizer.ggml.tokens", ())),
        width=width,
        layers=int(value("block_count")),
        heads=heads,
        kv_heads=int(value("attention.head_count_kv", heads)),
        head_dim=int(value("attention.key_length", width // heads)),
        ff=int(value("feed_forward_length")),
        rope_theta=float(value("rope.freq_base", 10_000.0)),
        # The file has a float32: 1e-05, not 9.999999747378752e-06, is what was meant and is written on export.
        rms_eps=float(str(np.float32(value("attention.layer_norm_rms_epsilon")))),
        tied="output.weight" not in tensors,
        max_positions=int(value("context_length")),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _unpermute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """[out, in] with each head's rows in pairs -> first halves, then second halves."""
    out, width = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)
