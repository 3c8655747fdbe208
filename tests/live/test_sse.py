"""Events are found in a stream however its bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live.servers.sse import EventReader, EventTooLongError

STREAM = (
    b": hello\n\ndata: {\"a\": 1}\n\nevent: x\r\nid: 3\r\ndata:two\r\ndata: lines\r\n\r\n"
    b"\n\n:\n\ndata: \xc3\xa4\n\ndata: [DONE]\n\n"
)  # fmt: skip
DATA = [b'{"a": 1}', b"two\nlines", b"\xc3\xa4", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    reader = EventReader()
    found = []
    for start, end in pairwise(places):
        found += reader.feed(STREAM[start:end])
    assert found == DATA


def test_events_that_come_byte_by_byte_come_when_they_are_whole() -> None:
    reader = EventReader()
    when = [i for i in range(len(STREAM)) if reader.feed(STREAM[i : i + 1])]
    assert [STREAM[i - 3 : i + 1] for i in when] == [b": 1}\n\n"[-4:], b"\r\n\r\n",
                                                     b"\xc3\xa4\n\n", b"E]\n\n"]  # fmt: skip


@pytest.mark.parametrize("part", [b"data: " + b"x" * 50, b"data: xxxxxxxx\n", b": " + b"x" * 50])
def test_an_event_that_does_not_end_is_given_up(part: bytes) -> None:
    reader = EventReader(max_bytes=100)
    assert reader.feed(part) == []
    with pytest.raises(EventTooLongError, match="more than 100 bytes"):
        reader.feed(20 * part)


def test_many_events_are_no_long_one() -> None:
    reader = EventReader(max_bytes=100)
    assert len(reader.feed(b"data: 0123456789\n\n" * 1000)) == 1000
