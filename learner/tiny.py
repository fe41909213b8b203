"""A tiny random policy, made offline in a second: what tests and the plumbing check of the demo run on."""

from __future__ import annotations

from pathlib import Path

import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nexactor.learner.model import Config, init
from nexactor.learner.tokenizer import PolicyTokenizer
from nexactor.learner.weights import Policy, save_policy

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "You are a helpful assistant. Tools: read_file(path), write_file(path, content), list_files(path), finish(answer).",
    'Call a tool by answering only, for example:\n<tool_call>{"name": "read_file", "arguments": {"path": "..."}}'
    "</tool_call>",
    "The user asks the assistant to create, edit, move, search, count and combine files in the workspace folder.",
    "notes.txt report.md data.csv src/main.py the file was written; the number of lines in the file is 12.",
)
VOCAB = 512  # at most; the corpus gives fewer


def tiny_tokenizer() -> PolicyTokenizer:
    """A byte-level BPE of some 440 entries: 3 special tokens, 256 bytes, and merges learnt from four sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    settings = {
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
    }
    return PolicyTokenizer(tokenizer, CHATML, settings)


def tiny_config(vocab: int) -> Config:
    """Two layers of width 64, four heads over two key-value heads, 2,048 positions."""
    return Config(
        vocab=vocab, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=160, max_positions=2048
    )


def make_tiny_policy(folder: Path, seed: int = 0) -> Policy:
    """Write a random Llama of about 120,000 weights as a Hugging Face folder and return it.

    The same seed gives the same bytes (on one version of jax and tokenizers).
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.vocab)
    # One compilation instead of one for every shape.
    params = jax.jit(init, static_argnums=0, static_argnames="scale")(config, jax.random.key(seed), scale=0.1)
    policy = Policy(params, config, tokenizer, f"tiny-{seed}")
    save_policy(policy, folder)
    return policy
