"""Policies on disk: load a Hugging Face folder or a GGUF file, write a Hugging Face folder.

Loading gives float32 arrays with layers stacked; writing and loading again gives the same bits. What is written
loads in transformers, vLLM and SGLang.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nexactor.events.errors import ConfigError
from nexactor.learner.hfconfig import config_from_hf, config_to_hf
from nexactor.learner.model import Config, Params, get, nest, weight_table
from nexactor.learner.tokenizer import PolicyTokenizer


@dataclass(frozen=True)
class Policy:
    """A model ready to run: weights (float32, layers stacked), shape, tokenizer, and a name for people."""

    params: Params
    config: Config
    tokenizer: PolicyTokenizer
    name: str


def load_policy(path: Path) -> Policy:
    """The policy at `path`: a Hugging Face folder, a .gguf file, or a folder that holds one of them.

    Raises ConfigError that names the file and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder; `nexactor policy get smollm2-135m` fetches a small model"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"{path}: a policy is a .gguf file or a folder with config.json and *.safetensors"
            )
        from nexactor.learner.gguf_weights import load_gguf

        return load_gguf(path)
    if (path / "config.json").is_file():
        return _load_folder(path)
    inside = sorted(path.glob("*.gguf"))
    if len(inside) == 1:
        return load_policy(inside[0])
    found = (
        f"{len(inside)} .gguf files, name one of them" if inside else "neither config.json nor a .gguf file"
    )
    raise ConfigError(f"{path}: holds {found}")


def _load_folder(folder: Path) -> Policy:
    config_file = folder / "config.json"
    raw = read_object(config_file)
    config = config_from_hf(raw, config_file)
    generation = folder / "generation_config.json"
    eos: list[int] = []
    for source in (raw, read_object(generation) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        eos += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    tokenizer = PolicyTokenizer.from_folder(folder, eos)
    check_vocab(config, tokenizer, folder)
    return Policy(_read_params(folder, config), config, tokenizer, folder.name)


def check_vocab(config: Config, tokenizer: PolicyTokenizer, source: Path) -> None:
    """The model must have a row for every token id."""
    if tokenizer.vocab > config.vocab:
        raise ConfigError(
            f"{source}: the tokenizer has {tokenizer.vocab} ids but the model only {config.vocab} rows; "
            "they belong to different models"
        )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ConfigError with the file's name."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); fetch the policy again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict):
            raise ConfigError(f"{index}: has no weight_map; fetch the policy again")
        files = sorted({folder / str(f) for f in names.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder}: no *.safetensors file (pickled .bin weights are not read); fetch it again"
        )
    where = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as f:
                where.update(dict.fromkeys(f.keys(), file))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: missing or damaged ({error}); fetch the policy again") from error
    return where


def _read_params(folder: Path, config: Config) -> Params:
    where = _weight_files(folder)
    flat: dict[str, Any] = {}
    with ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, framework="np")) for f in set(where.values())}

        def tensor(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray[Any, Any]:
            if name not in where:
                raise ConfigError(
                    f"{folder}: its safetensors files lack {name!r}, which config.json asks for"
                )
            value = np.asarray(opened[where[name]].get_tensor(name))
            value = value.T if transpose else value
            if value.shape != shape:
                raise ConfigError(
                    f"{where[name]}: {name} has shape {value.shape}, config.json asks for {shape}"
                )
            return value

        for w in weight_table(config):
            if not w.stacked:
                flat[w.path] = jnp.asarray(tensor(w.hf_name, w.shape, w.transpose), jnp.float32)
                continue
            layers = np.empty((config.layers, *w.shape), np.float32)
            for i in range(config.layers):
                layers[i] = tensor(w.hf_name.format(layer=i), w.shape, w.transpose)
            flat[w.path] = jnp.asarray(layers)
    return nest(flat)


def save_policy(policy: Policy, folder: Path) -> str:
    """Write a Hugging Face folder and return its digest (see `folder_digest`).

    Written beside its place and renamed into it, so that a reader sees all of it or nothing. What is there already
    is replaced.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        _write(policy, part)
        digest = folder_digest(part)
        put_in_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return digest


def _write(policy: Policy, folder: Path) -> None:
    config, tokenizer = policy.config, policy.tokenizer
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for w in weight_table(config):
        value = np.asarray(get(policy.params, w.path), np.float32)
        if not w.stacked:
            tensors[w.hf_name] = value
            continue
        for layer in range(config.layers):
            one = value[layer].T if w.transpose else value[layer]
            tensors[w.hf_name.format(layer=layer)] = np.ascontiguousarray(one)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {f"{n}_token_id": tokenizer.token_id(tokenizer.settings_token(n)) for n in ("bos", "eos", "pad")}
    eos = sorted(tokenizer.eos_ids)
    write_object(folder / "config.json", {**config_to_hf(config), **ids})
    write_object(folder / "generation_config.json", {**ids, "eos_token_id": eos, "_from_model_config": True})
    tokenizer.save(folder)
    # safetensors makes its file readable by its owner only: give it the mode of any other.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def write_object(path: Path, value: dict[str, Any]) -> None:
    """A JSON object to a file, keys sorted, so that equal content gives equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def folder_digest(folder: Path) -> str:
    """SHA-256 in hex over the names and SHA-256 digests of a folder's files, in order of name."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as f:
            whole.update(f"{path.name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def put_in_place(part: Path, folder: Path) -> None:
    """Flush a finished folder to disk and rename it to its final name, in exchange for what is there.

    Publish under a new name where a reader must never find nothing: between the two renames of an exchange the
    old folder is gone and the new one not there yet.
    """
    for path in part.iterdir():
        with path.open("rb") as f:
            os.fsync(f.fileno())
    while True:
        try:
            part.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = part.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        try:
            folder.rename(old)
        except FileNotFoundError:
            continue  # somebody else is replacing it too
        shutil.rmtree(old, ignore_errors=True)
