"""A model's `config.json`, as Hugging Face writes it, to our `Config` and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexactor.events.errors import ConfigError
from nexactor.learner.model import Config, RopeScaling

_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_READ = (*_FAMILIES, "mistral")


def config_from_hf(raw: dict[str, Any], source: Path) -> Config:
    """Our config from the object in config.json. Raises ConfigError that names the key it cannot honour."""
    family = raw.get("model_type")
    if family not in _READ:
        raise ConfigError(f"{source}: model_type {family!r} is not supported; {', '.join(_READ)} are")

    def number(key: str, default: Any = None) -> Any:
        value = raw.get(key, default)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{source}: {key} must be a number, it is {value!r}")
        return value

    for key, allowed in _SUPPORTED.items():
        if raw.get(key) not in (None, allowed):
            raise ConfigError(f"{source}: {key} = {raw[key]!r} is not supported, only {allowed!r} is")
    if family == "mistral" and raw.get("sliding_window"):
        raise ConfigError(f"{source}: sliding_window = {raw['sliding_window']} is not supported")
    if family != "qwen2" and raw.get("attention_bias"):
        raise ConfigError(f"{source}: attention_bias = true is not supported for {family}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    heads, width = int(number("num_attention_heads")), int(number("hidden_size"))
    return Config(
        vocab=int(number("vocab_size")),
        width=width,
        layers=int(number("num_hidden_layers")),
        heads=heads,
        kv_heads=int(number("num_key_value_heads", heads)),
        head_dim=int(number("head_dim", width // heads)),
        ff=int(number("intermediate_size")),
        rope_theta=float(rope.get("rope_theta") or number("rope_theta", 10_000.0)),
        rms_eps=float(number("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        max_positions=int(number("max_position_embeddings", 2048)),
        rope_scaling=_rope_scaling(rope, source),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


_SUPPORTED = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}


def _rope_scaling(rope: dict[str, Any], source: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    try:
        if kind == "linear":
            return RopeScaling("linear", float(rope["factor"]))
        if kind == "llama3":
            return RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ConfigError(f"{source}: rope scaling {kind!r} lacks {error}") from error
    raise ConfigError(f"{source}: rope scaling {kind!r} is not supported; default, linear and llama3 are")


def config_to_hf(config: Config) -> dict[str, Any]:
    """The object to write as config.json: the plainest family that has these weights."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    raw: dict[str, Any] = {
        "architectures": [_FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if (s := config.rope_scaling) is not None:
        raw["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_positions,
            }
    return raw
