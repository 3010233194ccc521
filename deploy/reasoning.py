"""Splits a model's output into reasoning and content at `</think>`, as the text arrives."""

from dataclasses import dataclass

_BEGIN = "<think>"
_END = "</think>"
_TOOL_CALL = "<tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """New text of either kind."""

    reasoning: str = ""
    content: str = ""


class ReasoningSplitter:
    """The state of one output.

    With thinking off, all is content. Otherwise output begins in the reasoning, with or without `<think>`; `</think>`
    or a `<tool_call>` ends it; later `</think>` are dropped. Output that ends before is all reasoning.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._thinking = thinking
        self._inside = thinking
        self._opened = False
        self._begun = False
        self._content_begun = not thinking
        self._held = ""

    def push(self, text: str) -> Split:
        """Take new output text; return what is certain now."""
        if not self._thinking:
            return Split(content=text)
        return self._take(self._held + text, final=False)

    def finish(self) -> Split:
        """The output is over: give out what was held back."""
        if not self._thinking:
            return Split()
        return self._take(self._held, final=True)

    def _take(self, text: str, *, final: bool) -> Split:
        self._held = ""
        reasoning = ""
        if self._inside:
            reasoning, text = self._take_reasoning(text, final=final)
        return Split(reasoning=reasoning, content="" if self._inside else self._take_content(text, final=final))

    def _take_reasoning(self, text: str, *, final: bool) -> tuple[str, str]:
        """Reasoning, and the rest that is content if the reasoning has ended."""
        if not self._begun:
            text = self._open(text.lstrip("\n"), final=final)
            self._begun = bool(text)
            if not text:
                return "", ""
        ends = [(at, mark) for mark in (_END, _TOOL_CALL) if (at := text.find(mark)) >= 0]
        if ends:
            at, mark = min(ends)
            self._inside = False
            return text[:at], text[at + len(_END) :] if mark == _END else text[at:]
        return self._hold(text, (_END, _TOOL_CALL), final=final), ""

    def _open(self, text: str, *, final: bool) -> str:
        """Drop `<think>` at the very beginning, and the line ends around it."""
        if self._opened:
            return text
        if not final and text != _BEGIN and _BEGIN.startswith(text):
            self._held = text
            return ""
        self._opened = True
        return text.removeprefix(_BEGIN).lstrip("\n")

    def _take_content(self, text: str, *, final: bool) -> str:
        # What is left around a dropped mark is never taken for another one, whether or not it came in one piece.
        before, _, after = text.rpartition(_END)
        shown = before.replace(_END, "") + self._hold(after, (_END,), final=final)
        if not self._content_begun:
            shown = shown.lstrip("\n")
        self._content_begun = self._content_begun or bool(shown)
        return shown

    def _hold(self, text: str, marks: tuple[str, ...], *, final: bool) -> str:
        """Keep back an end of the text that could be the beginning of a mark."""
        held = 0 if final else held_chars(text, marks)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def held_chars(text: str, marks: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that is a proper beginning of a mark."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
