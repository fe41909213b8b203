"""Text to token ids and back, and the model's own chat template: `PolicyTokenizer`.

The algorithm is `tokenizers` (the model's own tokenizer.json, or one built from a GGUF's metadata); the template is
the model's Jinja, run as transformers runs it. Nothing here decides what a conversation looks like.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nexactor.events.errors import ConfigError, NexactorError
from nexactor.events.messages import Message, ToolSpec
from nexactor.events.toolformat import as_text_messages

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>")
_SENTINEL = "nexactor-probe"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TemplateError(NexactorError):
    """The chat template refused the messages, or it does not continue the conversation it was given."""


class PolicyTokenizer:
    """A model's tokenizer and chat template.

    `settings` is the content of tokenizer_config.json, written back by `save`. `eos_ids` are the ids that end an
    answer when sampled; `end_of_turn` is the one the template itself puts there.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, settings: Mapping[str, Any], eos: Iterable[int] = ()
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.template = template
        self.settings = {k: v for k, v in settings.items() if k != "chat_template"}
        self._jinja = _compile(template)
        known = (self.token_id(t) for t in (*_TURN_ENDS, _token_text(settings.get("eos_token"))))
        self.eos_ids = frozenset(i for i in (*known, *eos) if i is not None)

    @classmethod
    def from_folder(cls, folder: Path, eos: Iterable[int] = ()) -> PolicyTokenizer:
        """From tokenizer.json and tokenizer_config.json (and chat_template.jinja) of a Hugging Face folder."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: no tokenizer.json; a policy needs the model's fast tokenizer beside it"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ConfigError(f"{path}: not a tokenizer.json that `tokenizers` can read ({error})") from error
        settings = _read_json(folder / "tokenizer_config.json")
        jinja_file = folder / "chat_template.jinja"
        template = jinja_file.read_text() if jinja_file.is_file() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates: the plain one is called "default"
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise ConfigError(
                f"{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "agents need an instruct model"
            )
        return cls(tokenizer, template, settings, eos)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], source: str) -> PolicyTokenizer:
        """From a GGUF file's metadata (name -> value); `source` names the file in errors."""
        prefix = "tokenizer.ggml."
        template = fields.get("tokenizer.chat_template")
        if fields.get(prefix + "model") != "gpt2" or not template:
            raise ConfigError(
                f"{source}: needs a byte-level BPE tokenizer (tokenizer.ggml.model gpt2, here "
                f"{fields.get(prefix + 'model')!r}) and a chat template; use the model's Hugging Face folder"
            )
        pieces: list[str] = fields[prefix + "tokens"]
        merges = [tuple(m.split(" ", 1)) for m in fields[prefix + "merges"]]
        bpe = models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=merges)
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = _pre_tokenizer(fields.get(prefix + "pre", "default"), source)
        tokenizer.decoder = decoders.ByteLevel()
        kinds: list[int] = fields[prefix + "token_type"]  # 3: control, 4: user defined
        tokenizer.add_special_tokens([_added(t, True) for t, k in zip(pieces, kinds, strict=True) if k == 3])
        tokenizer.add_tokens([_added(t, False) for t, k in zip(pieces, kinds, strict=True) if k == 4])
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (i := fields.get(f"{prefix}{theirs}_token_id")) is not None:
                settings[f"{ours}_token"] = pieces[i]
        settings["clean_up_tokenization_spaces"] = False
        return cls(tokenizer, template, settings)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are recognised; nothing is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids; special tokens stay in it unless `skip_special`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_id(self, token: str | None) -> int | None:
        """The id of one token's text, None if the vocabulary lacks it."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def settings_token(self, role: str) -> str | None:
        """The text of the `bos`, `eos`, `pad` or `unk` token that tokenizer_config.json names, if any."""
        return _token_text(self.settings.get(f"{role}_token"))

    @property
    def vocab(self) -> int:
        """How many ids there are, special tokens included; a model may have more rows than that."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def name(self) -> str:
        """`tokenizer-<12 hex digits>`, from the content: equal names give equal ids for equal messages."""
        content = json.dumps([json.loads(self._tokenizer.to_str()), self.template], sort_keys=True)
        return f"tokenizer-{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec], *, generation: bool) -> str:
        """The conversation as the model's template writes it; with `generation`, ready for the next answer.

        Raises TemplateError with the template's own words where it refuses the messages.
        """
        try:
            return self._jinja.render(
                messages=as_text_messages(messages, tools),
                add_generation_prompt=generation,
                **{k: _token_text(v) for k, v in self.settings.items() if k.endswith("_token")},
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the policy's chat template refused these messages: {error}") from error

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template puts after an assistant's answer."""
        turns = (Message("user", "x"), Message("assistant", _SENTINEL))
        tail = self.render(turns, (), generation=False).rpartition(_SENTINEL)[2]
        for i in self.encode(tail):
            if i in self.eos_ids:
                return self.decode([i])
        raise TemplateError(
            f"the policy's chat template puts {tail!r} after an answer, and no end token of this model "
            f"({', '.join(repr(self.decode([i])) for i in sorted(self.eos_ids)) or 'none known'}) is in it"
        )

    def continuation(
        self, before: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSpec], *, ended: bool
    ) -> str:
        """What follows the sampled ids of the last answer in the next call's prompt.

        `before` is the conversation up to and with that answer, `new` what was said since. The next prompt is the
        previous prompt's ids, the sampled ids, and `encode` of this text: nothing sampled is tokenised again.
        `ended` says that the last sampled id is `end_of_turn`; otherwise (cut by a limit, or a stop text) this
        begins with it. Raises TemplateError where the template rewrites the past: render anew then.
        """
        prefix = self.render(before, tools, generation=False)
        full = self.render([*before, *new], tools, generation=True)
        if not full.startswith(prefix):
            raise TemplateError("the policy's chat template rewrites earlier turns when new messages follow")
        _, end, tail = prefix.rpartition(self.end_of_turn)
        if not end or not before or before[-1].role != "assistant":
            raise TemplateError("a continuation needs a conversation that ends with the assistant's answer")
        return ("" if ended else end) + tail + full[len(prefix) :]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (with the template), as transformers reads them."""
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=False), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.settings,
            "chat_template": self.template,
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _compile(template: str) -> jinja2.Template:
    """The template in the environment that transformers gives it (`utils/chat_template_utils.py`)."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        # A prompt must not depend on the day it is rendered, or replays differ: Llama 3's own default day.
        return datetime.date(2024, 7, 26).strftime(form)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the policy's chat template is not valid Jinja: {error}") from error


def _pre_tokenizer(kind: str, source: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before BPE, by llama.cpp's name for it (`llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_*)."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    match kind:
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        case "gpt-2" | "default":
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "llama-bpe" | "qwen2":
            pattern = _LLAMA3 if kind == "llama-bpe" else _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            return pre_tokenizers.Sequence([split, bytes_only])
    raise ConfigError(
        f"{source}: its pre-tokenizer {kind!r} is not known here (smollm, gpt-2, llama-bpe, qwen2 are); "
        "use the model's Hugging Face folder"
    )


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, normalized=False, special=special)


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value
