"""Chat messages to prompt tokens by the checkpoint's template; special tokens in a client's text stay text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jinja2

from deploy.tokenizer import TextTokenizer
from router.errors import InvalidRequestError

Role = Literal["system", "developer", "user", "assistant", "tool"]
JsonObject = Mapping[str, object]

_THINK_END = "</think>"
# Unicode noncharacters: no text means anything by them, and a client that sends some cannot send them all.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function call that the assistant made in an earlier turn."""

    name: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation to be continued by the assistant."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[JsonObject, ...] = ()
    """Function descriptions as OpenAI's API has them, shown to the model by the template."""
    enable_thinking: bool | None = None
    """None leaves it to the template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedChat:
    """A conversation as the model reads it."""

    token_ids: tuple[int, ...]
    thinking: bool
    """The model's output begins with reasoning."""


def render_chat(tokenizer: TextTokenizer, chat: ChatPrompt, *, max_chars: int) -> RenderedChat:
    """Render and encode a conversation.

    Args:
        tokenizer: holds the template.
        chat: the conversation.
        max_chars: a longer rendered text cannot fit the context and is not worth encoding.

    Raises:
        InvalidRequestError: the model has no template, the template refuses the messages, or the text is too long.
    """
    messages = [_template_message(message) for message in chat.messages]
    tools = [dict(tool) for tool in chat.tools]
    text = _render(tokenizer, messages, tools, chat.enable_thinking)
    if len(text) > max_chars:
        raise InvalidRequestError(
            f"messages: the rendered conversation has {len(text)} characters, which cannot fit the model's context; "
            f"shorten it to less than {max_chars}",
            field="messages",
        )
    if _has_special([messages, tools], tokenizer):
        token_ids = _encode_marked(tokenizer, messages, tools, chat.enable_thinking, text)
    else:
        token_ids = tokenizer.encode_rendered(text)
    return RenderedChat(token_ids=token_ids, thinking=_starts_thinking(tokenizer, text, chat.enable_thinking))


def count_chars(chat: ChatPrompt) -> int:
    """Characters that a client sent in a conversation, wherever they stand in it."""
    messages = [_template_message(message) for message in chat.messages]
    return sum(map(len, _strings([messages, list(chat.tools)])))


def _template_message(message: ChatMessage) -> dict[str, object]:
    value: dict[str, object] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return value


def _render(
    tokenizer: TextTokenizer,
    messages: list[dict[str, object]],
    tools: list[dict[str, object]],
    enable_thinking: bool | None,
) -> str:
    if not tokenizer.template.source:
        raise InvalidRequestError(
            "messages: the model's checkpoint has no chat template; send a prompt to /v1/completions", field="messages"
        )
    try:
        return tokenizer.template.render(messages, tools, enable_thinking)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"messages: the model's chat template refuses this conversation: {error}", field="messages"
        ) from error


def _encode_marked(
    tokenizer: TextTokenizer,
    messages: list[dict[str, object]],
    tools: list[dict[str, object]],
    enable_thinking: bool | None,
    unmarked_text: str,
) -> tuple[int, ...]:
    """Encode a conversation in which some client text spells a special token.

    Each such spelling is rendered with a mark behind its first character; what the pattern of special tokens then
    still finds was written by the template.
    """
    mark = next((each for each in _MARKS if each not in unmarked_text), None)
    if mark is None:
        raise InvalidRequestError(
            "messages: contain special tokens and every Unicode noncharacter; remove U+FDD0 to U+FDEF", field="messages"
        )
    marked = [_mark(value, tokenizer, mark) for value in (messages, tools)]
    text = _render(tokenizer, _dicts(marked[0]), _dicts(marked[1]), enable_thinking)
    token_ids: list[int] = []
    begin = 0
    for found in tokenizer.special_pattern.finditer(text):
        token_ids.extend(tokenizer.encode_plain(text[begin : found.start()].replace(mark, "")))
        token_ids.extend(tokenizer.encode_rendered(found.group()))
        begin = found.end()
    token_ids.extend(tokenizer.encode_plain(text[begin:].replace(mark, "")))
    return tuple(token_ids)


def _dicts(value: object) -> list[dict[str, object]]:
    assert isinstance(value, list)
    return value


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    match value:
        case str():
            yield value
        case dict():
            for key, each in value.items():
                yield from _strings(key)
                yield from _strings(each)
        case list():
            for each in value:
                yield from _strings(each)
        case _:
            return


def _has_special(value: object, tokenizer: TextTokenizer) -> bool:
    return any(tokenizer.special_pattern.search(text) for text in _strings(value))


def _mark(value: object, tokenizer: TextTokenizer, mark: str) -> object:
    """A copy of a JSON value with the mark inside every spelling of a special token."""
    match value:
        case str():
            return tokenizer.special_pattern.sub(lambda found: found.group()[0] + mark + found.group()[1:], value)
        case dict():
            return {str(_mark(key, tokenizer, mark)): _mark(each, tokenizer, mark) for key, each in value.items()}
        case list():
            return [_mark(each, tokenizer, mark) for each in value]
        case _:
            return value


def _starts_thinking(tokenizer: TextTokenizer, text: str, enable_thinking: bool | None) -> bool:
    """Whether output begins in the reasoning, by the end of the rendered prompt and by what the template knows."""
    end = text.rstrip()
    if end.endswith("<think>"):
        return True
    if enable_thinking is False or end.endswith(_THINK_END):
        return False
    return "enable_thinking" in tokenizer.template.source
