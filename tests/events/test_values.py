"""Addresses, cursors, envelopes: the small values that everything else is made of."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexactor.events.cursor import START, Cursor, position, sequence_of
from nexactor.events.envelope import Envelope, decode_event, encode_record
from nexactor.events.errors import NexactorError
from nexactor.events.ids import check_address, digest, escape, kind_of, new_id, run_of, unescape
from nexactor.events.types import EVENT_TYPES, TimerFired, UnknownEvent


@given(st.text())
def test_escaping_makes_one_subject_token_and_loses_nothing(text: str) -> None:
    token = escape(text)
    assert token
    assert not set(token) & set(". *>\t\r\n")
    assert token.isascii()
    assert unescape(token) == text


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_texts_escape_differently(a: str, b: str) -> None:
    assert (escape(a) == escape(b)) == (a == b)


def test_an_address_names_its_kind_and_run() -> None:
    assert (kind_of("agent/r1/a/b"), run_of("agent/r1/a/b")) == ("agent", "r1")
    assert run_of(check_address("annotation/r1")) == "r1"


@pytest.mark.parametrize("text", ["", "agent", "agent/", "/r1", "agent/r1/", "agent/r 1", "agent//x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(NexactorError, match="write kind/run"):
        check_address(text)


def test_ids_sort_by_their_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert ids == sorted(set(ids))


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


@given(st.integers(0, 1 << 53), st.integers(0, 1023), st.integers(0, 1 << 53), st.integers(0, 1023))
def test_positions_order_like_message_and_index(s1: int, i1: int, s2: int, i2: int) -> None:
    assert (position(s1, i1) < position(s2, i2)) == ((s1, i1) < (s2, i2))
    assert sequence_of(position(s1, i1)) == s1


@given(st.lists(st.integers(0, 1 << 63), min_size=1))
def test_a_cursor_reads_back_from_its_text(positions: list[int]) -> None:
    cursor = Cursor(tuple(positions))
    assert Cursor.parse(str(cursor)) == cursor


def test_a_cursor_starts_at_the_start_and_advances() -> None:
    assert Cursor.parse("start") == Cursor.parse("") == START
    assert Cursor((5, 7)).advanced(9, shard=1) == Cursor((5, 9))


@pytest.mark.parametrize("text", ["x", "1,", "-1", "1.5"])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(NexactorError, match="not a log cursor"):
        Cursor.parse(text)


def test_an_older_reader_ignores_fields_that_a_newer_writer_added() -> None:
    envelope = Envelope(
        id="i", stream="agent/r", version=1, run="r", parent="", type="TimerFired", schema=1, time=0, cause="",
        correlation="", node="", traceparent="", prev=b"", body=msgspec.Raw(b"\xc0"),
    )  # fmt: skip
    fields = msgspec.msgpack.decode(encode_record(envelope))
    later = msgspec.msgpack.encode([*fields, "a field of the future"])
    assert msgspec.msgpack.decode(later, type=Envelope) == envelope
    body = msgspec.msgpack.encode({"timer": "t", "of the future": 1})
    assert decode_event("TimerFired", body) == TimerFired(timer="t")
    assert decode_event("FromTheFuture", body) == UnknownEvent(type="FromTheFuture", body=body)


def test_every_event_type_says_when_it_is_written() -> None:
    for name, cls in EVENT_TYPES.items():
        assert cls.__doc__, name
