"""Finds `<tool_call>` blocks in a model's content as it arrives, and reads the calls in them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.chat import JsonObject
from deploy.reasoning import held_chars

_BEGIN = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_BETWEEN_PARAMETERS = re.compile(rf"{_PARAMETER_END}\s*(?={_PARAMETER})")


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

    def __init__(self, tools: Sequence[JsonObject] = ()) -> None:
        """Take the functions that the client described, as OpenAI's API has them: their schemas type XML values."""
        self.num_calls = 0
        self._tools = tools
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
        call = _parse(body, self.num_calls, self._tools)
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


def _parse(body: str, index: int, tools: Sequence[JsonObject]) -> ParsedCall | None:
    """Read what a block holds: a JSON object (Qwen3), or a function in XML (Qwen3.5), known by how it begins."""
    read = _read_xml(body, tools) if body.lstrip().startswith(_FUNCTION) else _read_json(body)
    if read is None:
        return None
    name, arguments = read
    return ParsedCall(index=index, name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _read_json(body: str) -> tuple[str, Mapping[str, object]] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _read_xml(body: str, tools: Sequence[JsonObject]) -> tuple[str, Mapping[str, object]] | None:
    """`<function=NAME>`, then `<parameter=NAME>VALUE</parameter>` each; a last closing tag may be missing.

    A value may hold any text but a closing tag with a parameter behind it, so that one before the last that is not
    closed goes on over what looks like the next. A parameter given twice makes no call: which value is meant?
    """
    name, closed, inner = body.strip().removeprefix(_FUNCTION).partition(">")
    if not closed or not name.strip():
        return None
    # A value may hold any text, so that only the last closing tag ends the function.
    inner = inner.removesuffix("</function>")
    if not inner.strip():
        return name.strip(), {}
    types = _parameter_types(name.strip(), tools)
    arguments: dict[str, object] = {}
    *parameters, last = _BETWEEN_PARAMETERS.split(inner.lstrip())
    value, closed, rest = last.rpartition(_PARAMETER_END)
    if rest.strip() and closed:
        return None
    for parameter in (*parameters, value if closed else last):
        key, closed, value = parameter.removeprefix(_PARAMETER).partition(">")
        key = key.strip()
        if not parameter.startswith(_PARAMETER) or not closed or not key or key in arguments:
            return None
        # The template sets each value on lines of its own.
        arguments[key] = _read_value(value.removeprefix("\n").removesuffix("\n"), types.get(key))
    return name.strip(), arguments


def _parameter_types(function: str, tools: Sequence[JsonObject]) -> dict[str, frozenset[str]]:
    """The JSON types that the client's schema allows for each parameter of a function, where it names some."""
    for tool in tools:
        described = _section(tool, "function")
        if described.get("name") == function:
            properties = _section(_section(described, "parameters"), "properties")
            return {key: _types(schema) for key, schema in properties.items()}
    return {}


def _section(value: JsonObject, key: str) -> JsonObject:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _types(schema: object) -> frozenset[str]:
    """`type` of a JSON schema, one name or several, or those of its alternatives."""
    if not isinstance(schema, Mapping):
        return frozenset()
    alternatives = [each for key in ("anyOf", "oneOf") for each in _items(schema.get(key))]
    named = schema.get("type")
    own = [named] if isinstance(named, str) else [each for each in _items(named) if isinstance(each, str)]
    return frozenset(own).union(*map(_types, alternatives))


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _read_value(text: str, types: frozenset[str] | None) -> object:
    """A parameter's text as the schema's type; text where the schema allows that, or where it fits no other."""
    if not types or ("string" in types and text != "null"):
        return text
    try:
        # Models write Python's names too.
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and not math.isfinite(value):
        return text
    return value if _type_of(value) & types else text


def _type_of(value: object) -> frozenset[str]:
    """The names that a JSON schema has for a value's type."""
    match value:
        case None:
            return frozenset({"null"})
        case bool():
            return frozenset({"boolean"})
        case int():
            return frozenset({"integer", "number"})
        case float():
            return frozenset({"number"})
        case list():
            return frozenset({"array"})
        case dict():
            return frozenset({"object"})
        case _:
            # A JSON string in quotes: the text with its quotes is what the model wrote.
            return frozenset()
