"""Policies on disk: what is written can be read, by us and by others, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nexactor.events.errors import ConfigError
from nexactor.learner.hfconfig import config_from_hf, config_to_hf
from nexactor.learner.model import Config, RopeScaling
from nexactor.learner.tokenizer import PolicyTokenizer
from nexactor.learner.weights import Policy, folder_digest, load_policy, save_policy

Edit = Callable[[Path], Any]


def same_bits(a: Policy, b: Policy) -> bool:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny policy that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "policy"))


def test_what_is_written_reads_back_bit_for_bit(tiny: Policy, tmp_path: Path) -> None:
    digest = save_policy(tiny, tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert same_bits(again, tiny)
    assert again.config == tiny.config
    assert again.tokenizer.name == tiny.tokenizer.name
    assert again.name == "out"
    assert digest == folder_digest(tmp_path / "out")


def test_the_digest_changes_with_one_weight_and_not_with_the_place(tiny: Policy, tmp_path: Path) -> None:
    changed = replace(tiny, params={**tiny.params, "embed": tiny.params["embed"].at[5, 5].add(1e-3)})
    first = save_policy(tiny, tmp_path / "a")
    assert save_policy(tiny, tmp_path / "b") == first
    assert save_policy(changed, tmp_path / "a") != first


def test_writing_again_replaces_the_folder_and_leaves_nothing_beside_it(tiny: Policy, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    save_policy(tiny, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert len({oct(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}) == 1


def test_a_write_that_fails_leaves_what_was_there(
    tiny: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_policy(tiny, tmp_path / "out")

    def full(self: PolicyTokenizer, folder: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PolicyTokenizer, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_policy(tiny, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert folder_digest(tmp_path / "out") == before


def test_sharded_weights_are_read_through_their_index(folder: Path, tiny: Policy) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({n: tensors[n] for n in inside}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, inside in parts.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_bits(load_policy(folder), tiny)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_load_as_float32(folder: Path, tiny: Policy, dtype: Any) -> None:
    file = folder / "model.safetensors"
    halves = {n: a.astype(dtype) for n, a in load_file(file).items()}
    if dtype is np.float16:
        save_file(halves, file)
    else:  # safetensors' numpy writer knows no bfloat16: the file as torch writes it
        write_safetensors(file, {n: ("BF16", a) for n, a in halves.items()})
    loaded = load_policy(folder).params["embed"]
    assert loaded.dtype == np.float32
    expected = np.asarray(tiny.params["embed"]).astype(dtype).astype(np.float32)
    assert np.array_equal(loaded, expected)


def write_safetensors(file: Path, tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def configure(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def retensor(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


Q0 = "model.layers.0.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Edit, str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors file"),
    "cut short": (truncate, r"model\.safetensors: missing or damaged"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), r"missing or damaged"),
    "a weight is missing": (retensor(lambda t: t.pop(Q0)), rf"lack '{Q0}'"),
    "a weight has another shape": (retensor(lambda t: t.update({Q0: t[Q0][:5].copy()})), "q_proj.*has shape"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: must hold"),
    "another family": (configure(model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "a width that is text": (configure(hidden_size="64"), "hidden_size must be a number"),
    "another activation": (configure(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "biases in Llama": (configure(attention_bias=True), "attention_bias"),
    "a window": (configure(model_type="mistral", sliding_window=4096), "sliding_window = 4096"),
    "another rope": (configure(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope scaling 'yarn'"),
    "half a rope": (
        configure(rope_scaling={"rope_type": "llama3", "factor": 4.0}),
        "lacks 'low_freq_factor'",
    ),
    "more ids than rows": (configure(vocab_size=100), "belong to different models"),
    "an index without files": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "gone.safetensors"}}'
        ),
        r"gone\.safetensors: missing or damaged",
    ),
    "an index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_its_file(folder: Path, kind: str) -> None:
    edit, message = DAMAGE[kind]
    edit(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_policy(folder)
    assert str(folder) in str(caught.value)


def test_a_path_that_holds_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_policy(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"neither config\.json nor"):
        load_policy(tmp_path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(ConfigError, match=r"a policy is a \.gguf file or a folder"):
        load_policy(tmp_path / "a.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"2 \.gguf files"):
        load_policy(tmp_path)


BASE = Config(vocab=10, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, ff=16)


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, tied=False, rms_eps=1e-6, rope_theta=5e5, max_positions=99, head_dim=16),
        replace(BASE, rope_scaling=RopeScaling("linear", 2.0)),
        replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 1.5, 4.5, 4096)),
        replace(BASE, qkv_bias=True),
        replace(BASE, qk_norm=True),
    ],
)
def test_configs_survive_the_way_through_config_json(config: Config) -> None:
    raw = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(raw, Path("config.json")) == config


def test_rope_parameters_of_transformers_5_are_read() -> None:
    raw = config_to_hf(BASE)
    del raw["rope_theta"], raw["rope_scaling"]
    raw["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 12345.0}
    config = config_from_hf(raw, Path("config.json"))
    assert (config.rope_theta, config.rope_scaling) == (12345.0, RopeScaling("linear", 2.0))


def test_every_end_token_of_the_files_ends_an_answer(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_policy(folder).tokenizer.eos_ids == {0, 2, 7}


@pytest.mark.torch_required
def test_what_is_written_equals_the_original_in_transformers(tiny: Policy, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    save_policy(tiny, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}
    assert model.generation_config.eos_token_id == [0, 2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "ours" / name, tmp_path / "theirs" / name)
    assert load_policy(tmp_path / "theirs").config == tiny.config
