"""Finds `<tool_call>` blocks in a model's content as it arrives, and reads the calls in them."""

import json
from dataclasses import dataclass

from deploy.reasoning import held_chars

_BEGIN = "<tool_call>"
_END = "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """One function call that the model made."""

    index: int
    """Counts the calls of one output from 0."""
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSplit:
    """New content and the calls that are complete now."""

    content: str = ""
    calls: tuple[ParsedCall, ...] = ()


class ToolCallParser:
    """The state of one output. A block that holds no valid call is given out as the text it is."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""
        self._after_call = False

    def push(self, text: str) -> ToolSplit:
        """Take new content; a call is given out whole, when its block is closed."""
        return self._take(self._held + text, final=False)

    def finish(self) -> ToolSplit:
        """The output is over: an open block is read as if it were closed."""
        return self._take(self._held, final=True)

    def _take(self, text: str, *, final: bool) -> ToolSplit:
        self._held = ""
        content: list[str] = []
        calls: list[ParsedCall] = []
        while text:
            before, begin, rest = text.partition(_BEGIN)
            if not begin:
                held = 0 if final else held_chars(text, (_BEGIN,))
                content.append(self._trim(text[: len(text) - held]))
                self._held = text[len(text) - held :]
                break
            content.append(self._trim(before))
            body, end, text = rest.partition(_END)
            if not end and not final:
                self._held = begin + rest
                break
            self._read(body, begin + body + end, content, calls)
        return ToolSplit(content="".join(content), calls=tuple(calls))

    def _read(self, body: str, block: str, content: list[str], calls: list[ParsedCall]) -> None:
        call = _parse(body, self.num_calls)
        if call is None:
            content.append(block)
            return
        calls.append(call)
        self.num_calls += 1
        self._after_call = True

    def _trim(self, text: str) -> str:
        """Drop the blank lines between calls."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text


def _parse(body: str, index: int) -> ParsedCall | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ParsedCall(index=index, name=name, arguments=json.dumps(arguments, ensure_ascii=False))
