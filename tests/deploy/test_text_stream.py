"""Text that grows: whole characters only, stop strings never shown in part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.text_stream import StopMatcher, TextStream


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        result = matcher.push(piece)
        text += result.text
        if result.stopped:
            return text, True
    return text + matcher.flush(), False


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """The stop string that ends first, the longest of those; by brute force."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_output_ends_before_the_first_stop_string_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    assert shown(stops, pieces) == reference(stops, "".join(pieces))


@given(stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), text=st.text("abc", max_size=16))
def test_exactly_the_text_that_could_become_a_stop_string_is_held_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    given_out = ""
    for char in text:
        result = matcher.push(char)
        seen += char
        given_out += result.text
        if result.stopped:
            return
        held = max(n for n in range(len(seen) + 1) if n == 0 or any(stop.startswith(seen[-n:]) for stop in stops))
        assert given_out == seen[: len(seen) - held]


@given(st.lists(st.binary(max_size=4), max_size=12))
def test_pieces_of_bytes_become_the_same_text_as_the_whole(tokens: list[bytes]) -> None:
    stream = TextStream()
    text = "".join(stream.push(token).text for token in tokens) + stream.finish().text

    assert text == b"".join(tokens).decode("utf-8", errors="replace")


def test_half_a_character_is_held_until_the_rest_comes() -> None:
    stream = TextStream()
    data = "\u4f60\u597d".encode()

    assert [stream.push(bytes([byte])).text for byte in data] == ["", "", "\u4f60", "", "", "\u597d"]


def test_a_character_left_unfinished_becomes_a_replacement_at_the_end() -> None:
    stream = TextStream()
    assert stream.push(b"a\xe4\xbd").text == "a"

    assert stream.finish().text == "\ufffd"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    stream = TextStream(stops=["b"], min_tokens=2)
    pieces = [stream.push(token) for token in (b"b", b"b", b"ab")]

    assert [piece.text for piece in pieces] == ["b", "b", "a"]
    assert [piece.stopped for piece in pieces] == [False, False, True]


def test_a_replacement_at_the_end_can_complete_a_stop_string() -> None:
    stream = TextStream(stops=["\ufffd"])
    stream.push(b"a\xe4")

    assert stream.finish().stopped


@pytest.mark.parametrize(("stop", "text"), [("aab", "aaab"), ("abab", "abaabab")])
def test_a_stop_string_that_overlaps_itself_is_found(stop: str, text: str) -> None:
    assert shown([stop], list(text)) == (text[: -len(stop)], True)
