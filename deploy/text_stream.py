"""Text out of a growing token sequence: no half characters, no part of a stop string, constant work a character."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """New text that may be shown, and whether a stop string ended the output."""

    text: str
    stopped: bool = False


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces of any size.

    It runs one Knuth-Morris-Pratt automaton a stop string, so that the result does not depend on the pieces and
    exactly the text that could still become a stop string is held back. Of several stops that end at the same
    character the longest wins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._tables = tuple(_failure_table(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> Piece:
        """Take new text; return what may be shown now."""
        if not self._stops:
            return Piece(text)
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            length = self._advance(char)
            if length:
                self._held = ""
                return Piece(buffer[: end - length], stopped=True)
        shown = len(buffer) - max(self._matched)
        self._held = buffer[shown:]
        return Piece(buffer[:shown])

    def skip(self, text: str) -> Piece:
        """Take text in which no stop string counts (before `min_tokens`)."""
        shown = self.flush() + text
        return Piece(shown)

    def flush(self) -> str:
        """Give out what was held back: the output is over, or stops begin anew."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> int:
        """Feed one character; return the length of the longest stop string that it completes, or 0."""
        complete = 0
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != char:
                matched = self._tables[index][matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                complete = max(complete, matched)
                matched = self._tables[index][matched - 1]
            self._matched[index] = matched
        return complete


class TextStream:
    """The output text of one sequence: bytes of tokens in, text that may be shown out."""

    def __init__(self, *, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0

    def push(self, token: bytes) -> Piece:
        """Take the bytes of the next token."""
        self._num_tokens += 1
        text = self._decoder.decode(token)
        if self._num_tokens <= self._min_tokens:
            return self._matcher.skip(text)
        return self._matcher.push(text)

    def finish(self) -> Piece:
        """The sequence is over: give out what was held back; an unfinished character becomes U+FFFD."""
        piece = self._matcher.push(self._decoder.decode(b"", final=True))
        if piece.stopped:
            return piece
        return Piece(piece.text + self._matcher.flush())


def _failure_table(stop: str) -> tuple[int, ...]:
    """For each prefix of `stop`: the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[index] != stop[matched]:
            matched = table[matched - 1]
        if stop[index] == stop[matched]:
            matched += 1
        table[index] = matched
    return tuple(table)
