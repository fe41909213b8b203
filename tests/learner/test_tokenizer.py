"""Ids, templates, and continuations that keep what was sampled."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexactor.events.errors import ConfigError
from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.learner.tiny import tiny_tokenizer
from nexactor.learner.tokenizer import PolicyTokenizer, TemplateError
from nexactor.learner.weights import Policy

TOOLS = (
    ToolSpec("read_file", "Read a file.", {"properties": {"path": {"type": "string"}}, "required": ["path"]}),
)
TINY = tiny_tokenizer()
TURN = "<|im_end|>"


def conversation(answer: Message, *new: Message) -> tuple[list[Message], list[Message]]:
    before = [Message("system", "You edit files."), Message("user", "Read a.txt, then answer."), answer]
    return before, list(new)


def next_prompt(
    tokenizer: PolicyTokenizer, before: list[Message], new: list[Message], sampled: list[int], ended: bool
) -> list[int]:
    """The next call's prompt as the policy server builds it: nothing sampled is tokenised again."""
    prompt = tokenizer.encode(tokenizer.render(before[:-1], TOOLS, generation=True))
    return prompt + sampled + tokenizer.encode(tokenizer.continuation(before, new, TOOLS, ended=ended))


CALL = Message("assistant", "", (ToolCall("c1", "read_file", '{"path": "a.txt"}'),))
ANSWERS = {
    "a call": (CALL, '<tool_call>{"name": "read_file", "arguments": {"path": "a.txt"}}</tool_call>'),
    "prose": (Message("assistant", "I cannot do that."), "I cannot do that."),
    "unicode": (Message("assistant", "Ünïcode 漢字 🙂 done"), "Ünïcode 漢字 🙂 done"),
}
NEW = (Message("tool", "line 1\n  line 2\n", tool_call_id="c1"), Message("user", "And now?"))


@pytest.mark.parametrize("which", ANSWERS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_continued_prompt_equals_the_template_in_text_and_ids(which: str, ended: bool) -> None:
    check_continuation(TINY, which, ended)


@pytest.mark.parametrize("which", ANSWERS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_continued_prompt_equals_smollm2s_template(smollm2: Policy, which: str, ended: bool) -> None:
    check_continuation(smollm2.tokenizer, which, ended)


def check_continuation(tokenizer: PolicyTokenizer, which: str, ended: bool) -> None:
    answer, text = ANSWERS[which]
    before, new = conversation(answer, *NEW)
    sampled = tokenizer.encode(text + (TURN if ended else ""))
    ids = next_prompt(tokenizer, before, new, sampled, ended)
    whole = tokenizer.render([*before, *new], TOOLS, generation=True)
    assert tokenizer.decode(ids) == whole
    assert ids == tokenizer.encode(whole)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(answer=WORDS, said=WORDS, ended=st.booleans(), cut=st.randoms(use_true_random=False))
def test_whatever_was_sampled_stays_and_the_rest_is_the_templates(
    answer: str, said: str, ended: bool, cut: random.Random
) -> None:
    # A policy samples pieces that its tokenizer would not choose: spell some answers byte by byte.
    sampled = TINY.encode(answer) if cut.random() < 0.5 else [i for c in answer for i in TINY.encode(c)]
    sampled += TINY.encode(TURN) if ended else []
    before, new = conversation(Message("assistant", answer), Message("user", said))
    ids = next_prompt(TINY, before, new, sampled, ended)
    prompt = TINY.encode(TINY.render(before[:-1], TOOLS, generation=True))
    assert ids[: len(prompt) + len(sampled)] == prompt + sampled
    assert TINY.decode(ids) == TINY.render([*before, *new], TOOLS, generation=True)


def with_template(template: str) -> PolicyTokenizer:
    return PolicyTokenizer(tiny_tokenizer()._tokenizer, template, TINY.settings)


FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_the_past_is_not_continued() -> None:
    before, new = conversation(Message("assistant", "<think>hm</think>yes"), Message("user", "Sure?"))
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        with_template(FORGETFUL).continuation(before, new, (), ended=True)
    kept = with_template(FORGETFUL).continuation(
        conversation(Message("assistant", "yes"))[0], new, (), ended=True
    )
    assert kept == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_that_does_not_end_with_an_answer_is_not_continued() -> None:
    with pytest.raises(TemplateError, match="ends with the assistant's answer"):
        TINY.continuation([Message("user", "hi")], [Message("user", "again")], (), ended=True)


def test_a_templates_own_refusal_is_reported_in_its_words() -> None:
    strict = with_template("{% for m in messages %}{{ raise_exception('No ' + m.role) }}{% endfor %}")
    with pytest.raises(TemplateError, match="No user"):
        strict.render([Message("user", "x")], (), generation=True)


def test_a_template_without_an_end_token_is_reported() -> None:
    open_ended = with_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(TemplateError, match="no end token"):
        _ = open_ended.end_of_turn


def test_templates_cannot_reach_python() -> None:
    nasty = with_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TemplateError):
        nasty.render([Message("user", "x")], (), generation=True)


def test_a_template_gives_the_same_text_on_any_day() -> None:
    dated = with_template("{{ strftime_now('%d %b %Y') }}")
    assert dated.render([], (), generation=True) == "26 Jul 2024"


def test_special_tokens_are_read_from_text_and_shown_unless_skipped() -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = TINY.encode(text)
    assert ids[0] == TINY.token_id("<|im_start|>")
    assert TINY.decode(ids) == text
    assert TINY.decode(ids, skip_special=True) == "user\nhi"
    assert TINY.eos_ids == {TINY.token_id("<|im_end|>"), TINY.token_id("<|endoftext|>")}
    assert TINY.end_of_turn == "<|im_end|>"


def test_a_saved_tokenizer_is_the_same_by_name_ids_and_template(tmp_path: Path) -> None:
    TINY.save(tmp_path)
    again = PolicyTokenizer.from_folder(tmp_path)
    messages = [Message("user", "count the lines")]
    assert again.name == TINY.name
    assert again.render(messages, TOOLS, generation=True) == TINY.render(messages, TOOLS, generation=True)
    assert again.eos_ids == TINY.eos_ids
    assert with_template("{{ 'other' }}").name != TINY.name


def test_a_chat_template_file_wins_over_the_settings(tmp_path: Path) -> None:
    TINY.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert PolicyTokenizer.from_folder(tmp_path).render([], (), generation=True) == "from the file"


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def put(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("tokenizer.json"), "no tokenizer.json"),
        (put("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer.json"),
        (drop("tokenizer_config.json"), "no chat template"),
        (put("tokenizer_config.json", "{"), "tokenizer_config.json: not valid JSON"),
        (put("chat_template.jinja", "{% for %}"), "not valid Jinja"),
    ],
)
def test_damaged_tokenizer_files_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    TINY.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        PolicyTokenizer.from_folder(tmp_path)


def strings() -> list[str]:
    """A few hundred texts that tokenizers disagree on: digits, white space, scripts, special tokens, code."""
    rng = random.Random(7)
    pieces = [
        "hello", " world", "  ", "\n", "\n\n", "\t", "\r\n", "12345", " 007", "3.14", "²½", "don't", "I'LL", "é",
        "漢字", "かな", "🙂", "👩‍👩‍👧", "עברית", "\u00a0", "\u200b", "<|im_start|>", "<|im_end|>",
        "<|endoftext|>", "<file_sep>", "<|im_", '{"name": "x"}', "def f(x):\n    return x", "----", "...", "a" * 40,
        "http://a.b/c?d=e&f=1", "Ǆ", "ﬁ", "e\u0301", "\x00", "\x7f", "…", "“quoted”", "$%^&*()",
    ]  # fmt: skip
    return pieces + ["".join(rng.choices(pieces, k=rng.randint(2, 9))) for _ in range(300)]


@pytest.mark.torch_required
def test_smollm2s_ids_equal_transformers(smollm2: Policy, smollm2_file: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)
    # transformers reads no pre-tokenizer from a GGUF and so leaves out SmolLM2's first step, "cut out every digit"
    # (its tokenizer.json; llama.cpp's `smollm`). It shows where white space runs up to a digit: the next test.
    texts = [t for t in strings() if not re.search(r"\s[\d²½]", t)]
    assert len(texts) > 200
    for text in texts:
        ids = smollm2.tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)


def test_smollm2_cuts_digits_out_before_anything_else(smollm2: Policy) -> None:
    encode = smollm2.tokenizer.encode
    for parts in (["x", " \n", "1", "2"], ["  ", "7"], ["a", "1", "\n\n", "2"]):
        assert encode("".join(parts)) == [i for part in parts for i in encode(part)]


def test_text_survives_the_way_to_ids_and_back(smollm2: Policy) -> None:
    for text in strings():
        assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


@pytest.mark.torch_required
def test_a_saved_tokenizer_works_in_transformers(tiny_folder: Path, tiny: Policy, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shutil.copytree(tiny_folder, tmp_path / "copy"))
    for text in strings():
        assert tiny.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)
    messages = [Message("system", "s"), Message("user", "u")]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert text == tiny.tokenizer.render(messages, (), generation=True)
    assert theirs.eos_token == "<|im_end|>"
    assert json.loads((tiny_folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
