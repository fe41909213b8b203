"""GGUF files: read as llama.cpp's converter writes them, and damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from nexactor.events.errors import ConfigError
from nexactor.events.messages import Message
from nexactor.learner.gguf_weights import _NAMES
from nexactor.learner.model import Config, get, init, weight_table
from nexactor.learner.tiny import CHATML, SPECIAL, tiny_tokenizer
from nexactor.learner.weights import Policy, load_policy

TINY = tiny_tokenizer()
CONFIG = Config(vocab=TINY.vocab, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ff=64, tied=False)


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, copied."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, config: Config, *, leave_out: str = "", **fields: Any) -> Policy:
    """A random policy in the form in which llama.cpp's converter writes it, and the policy itself."""
    params = init(config, jax.random.key(0), scale=0.1)
    family = "qwen2" if config.qkv_bias else "llama"
    writer = gguf.GGUFWriter(path, fields.get("architecture", family))
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ff)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    inner = TINY._tokenizer
    vocab = sorted(inner.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "gpt-2"))
    writer.add_token_list([t for t, _ in vocab])
    writer.add_token_types([3 if t in SPECIAL else 1 for t, _ in vocab])
    merges = json.loads(inner.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template(fields.get("template", CHATML))
    for w in weight_table(config):
        value = np.asarray(get(params, w.path))
        for layer, one in enumerate(value if w.stacked else [value]):
            one = one.T if w.transpose else one
            if family == "llama" and w.path in ("layers/q", "layers/k"):
                one = permute(one, config.heads if w.path == "layers/q" else config.kv_heads)
            name = _NAMES[w.path].format(layer=layer)
            if name != leave_out:
                writer.add_tensor(name, np.ascontiguousarray(one))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Policy(params, config, TINY, path.stem)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, tied=True), replace(CONFIG, qkv_bias=True)])
def test_weights_config_and_tokenizer_come_back_as_they_were(tmp_path: Path, config: Config) -> None:
    original = write_gguf(tmp_path / "tiny.gguf", config)
    loaded = load_policy(tmp_path)  # the folder that holds it
    assert loaded.config == config
    assert loaded.name == "tiny"
    for w in weight_table(config):
        assert np.array_equal(get(loaded.params, w.path), get(original.params, w.path)), w.path
    text = "<|im_start|>user\nread_file 12  é<|im_end|>"
    assert loaded.tokenizer.encode(text) == TINY.encode(text)
    assert loaded.tokenizer.eos_ids == TINY.eos_ids
    messages = [Message("user", "hi")]
    assert loaded.tokenizer.render(messages, (), generation=True) == TINY.render(
        messages, (), generation=True
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma' is not supported"),
        ({"tokenizer": "llama"}, "needs a byte-level BPE tokenizer"),
        ({"template": ""}, "and a chat template"),
        ({"pre": "starcoder"}, "pre-tokenizer 'starcoder' is not known"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"has no tensor 'blk\.1\.ffn_up\.weight'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = tmp_path / "odd.gguf"
    write_gguf(path, CONFIG, **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, 5_000, -1_000])
def test_a_file_cut_short_is_damaged_not_a_crash(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, CONFIG)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"cut\.gguf: not a readable GGUF file"):
        load_policy(path)


def test_smollm2_is_what_it_says(smollm2: Policy) -> None:
    c = smollm2.config
    assert (c.layers, c.width, c.heads, c.kv_heads, c.vocab, c.tied) == (30, 576, 9, 3, 49_152, True)
    assert (c.rope_theta, c.rms_eps, c.max_positions) == (100_000.0, 1e-5, 8192)
    assert smollm2.tokenizer.end_of_turn == "<|im_end|>"
