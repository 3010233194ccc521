"""A JSON body of the OpenAI API to the plain input of the validation layer."""

import json
import re
from typing import Final, TypeVar, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deploy.chat import ChatMessage, ChatPrompt, JsonObject, ToolCall
from deploy.schema import ChatRequest, CompletionRequest, Message, SamplingFields, StrictModel, ToolCallMessage
from deploy.validation import GenerationInput, SamplingInput, TextPrompts, TokenPrompts
from router.errors import InvalidRequestError

Body = TypeVar("Body", bound=StrictModel)

# OpenAI's default for completions; chat fills the context.
_COMPLETION_MAX_TOKENS = 16
_MAX_PROBLEMS: Final = 1000
"""Describing more takes longer than anybody may hold up the others."""
_BRACKET: Final = re.compile(r"[\[\]{}]")
_MAX_JSON_DEPTH: Final = 64
"""Of JSON inside of a string field; the JSON around it is bounded by its parser."""
# What would do, where pydantic's own words are of no help.
_REMEDIES = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "must be a string or a list of strings",
    "echo": "is not supported; leave it out or send false",
    "tool_choice": 'must be "none" or "auto"; a call cannot be forced',
    "parallel_tool_calls": "can only be true; leave it out",
    "response_format": 'can only be {"type": "text"}',
    "logit_bias": "must be an object of token ids and numbers",
}


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Read a request body.

    Raises:
        InvalidRequestError: it is not JSON in UTF-8, or names the first field that is unknown or of a wrong type.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > _MAX_PROBLEMS:
            raise _invalid("body", f"has {error.error_count()} unknown or wrong fields; read the API") from None
        problems = error.errors(include_url=False, include_context=False)
    raise _refusal(problems)


def chat_input(body: ChatRequest, *, tenant: str, deadline_unix_s: float | None) -> GenerationInput:
    """The plain input of a chat completion.

    Raises:
        InvalidRequestError: fields contradict each other.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("top_logprobs", "needs logprobs=true")
    limits = {each for each in (body.max_tokens, body.max_completion_tokens) if each is not None}
    if len(limits) > 1:
        raise _invalid("max_tokens", f"is {body.max_tokens} but max_completion_tokens is {body.max_completion_tokens}")
    tools = body.tools if body.tools and body.tool_choice != "none" else []
    prompt = ChatPrompt(
        messages=tuple(_message(index, message) for index, message in enumerate(body.messages)),
        tools=tuple(tool.model_dump(exclude_none=True) for tool in tools),
        enable_thinking=body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None,
    )
    return GenerationInput(
        model=body.model,
        prompt=prompt,
        sampling=_sampling(body, limits.pop() if limits else None, (body.top_logprobs or 0) if body.logprobs else None),
        n=1 if body.n is None else body.n,
        stop=_stop(body),
        priority=body.priority or 0,
        tenant=tenant,
        deadline_unix_s=deadline_unix_s,
    )


def completion_input(body: CompletionRequest, *, tenant: str, deadline_unix_s: float | None) -> GenerationInput:
    """The plain input of a text completion.

    Raises:
        InvalidRequestError: fields contradict each other.
    """
    return GenerationInput(
        model=body.model,
        prompt=_prompts(body.prompt),
        sampling=_sampling(body, body.max_tokens, body.logprobs),
        n=1 if body.n is None else body.n,
        stop=_stop(body),
        default_max_tokens=_COMPLETION_MAX_TOKENS,
        priority=body.priority or 0,
        tenant=tenant,
        deadline_unix_s=deadline_unix_s,
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> TextPrompts | TokenPrompts:
    if isinstance(prompt, str):
        return TextPrompts(texts=(prompt,))
    # The items are of one type: the body was checked. Long lists are common, so only the first one is looked at.
    match prompt[:1]:
        case [str()]:
            return TextPrompts(texts=cast(tuple[str, ...], tuple(prompt)))
        case [int()]:
            return TokenPrompts(token_ids=(cast(tuple[int, ...], tuple(prompt)),))
        case _:
            return TokenPrompts(token_ids=tuple(map(tuple, cast(list[list[int]], prompt))))


def _sampling(body: SamplingFields, max_tokens: int | None, logprobs: int | None) -> SamplingInput:
    if body.stream_options is not None and not body.stream:
        raise _invalid("stream_options", "needs stream=true")
    if body.prompt_logprobs is not None and body.stream:
        raise _invalid("prompt_logprobs", "cannot be streamed; send stream=false")
    return SamplingInput(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple((_token_id(key), bias) for key, bias in (body.logit_bias or {}).items()),
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise _invalid("logit_bias", f"keys must be token ids, got {key[:40]!r}")
    return int(key)


def _stop(body: SamplingFields) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _message(index: int, message: Message) -> ChatMessage:
    if message.tool_call_id is not None and message.role != "tool":
        raise _invalid(f"messages[{index}].tool_call_id", "belongs to tool messages only; remove it")
    parts = message.content if isinstance(message.content, list) else []
    content = message.content if isinstance(message.content, str) else "".join(part.text for part in parts)
    if message.content is None and message.role != "assistant":
        raise _invalid(f"messages[{index}].content", "is required")
    calls = enumerate(message.tool_calls or [])
    return ChatMessage(
        role=message.role,
        content=content,
        reasoning=message.reasoning or message.reasoning_content or "",
        tool_calls=tuple(_tool_call(f"messages[{index}].tool_calls[{at}]", call) for at, call in calls),
    )


def _tool_call(field: str, call: ToolCallMessage) -> ToolCall:
    arguments = parse_json_object(f"{field}.function.arguments", call.function.arguments)
    return ToolCall(name=call.function.name, arguments=arguments)


def parse_json_object(field: str, text: str) -> JsonObject:
    """Read JSON that a client sent inside of a string field.

    Raises:
        InvalidRequestError: it is not a JSON object, is nested too deep, or has half of a surrogate pair in it.
    """
    if _depth(text) > _MAX_JSON_DEPTH:
        raise _invalid(field, f"is nested deeper than {_MAX_JSON_DEPTH} levels; flatten it")
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise _invalid(field, "is not JSON in Unicode; send a JSON object") from error
    if not isinstance(value, dict):
        raise _invalid(field, "must be a JSON object")
    return value


def _depth(text: str) -> int:
    """How deep brackets are nested at most, those in strings counted too."""
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _invalid(field: str, rest: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {rest}", field=field)


def _refusal(problems: list[ErrorDetails]) -> InvalidRequestError:
    """The error for what pydantic found: a wrong body, else an unknown field, else the most precise problem."""
    unknown = [each for each in problems if each["type"] == "extra_forbidden"]
    problem = max(unknown or problems, key=lambda each: len(each["loc"]))
    if problem["type"] == "json_invalid":
        return InvalidRequestError("body: is not JSON in UTF-8, or is nested too deep", field="body")
    field = _path(problem["loc"]) or "body"
    if unknown and field.startswith("response_format."):
        return _invalid("response_format", f"{_REMEDIES['response_format']}; leave it out")
    if unknown:
        return _invalid(field, "is unknown or not supported; remove it")
    if problem["type"] == "missing":
        return _invalid(field, "is required")
    remedy = _REMEDIES.get(field, _first_lower(problem["msg"]).replace("input should be", "must be"))
    return _invalid(field, f"{remedy}; got {_shown(problem['input'])}")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`, without the names that pydantic gives to the arms of a union."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in {"str", "int"} and "[" not in part:
            path += f".{part}" if path else part
    return path.split("[")[0] if path.startswith("prompt[") else path


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _shown(value: object) -> str:
    """A short, harmless form of a client's own value."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return json.dumps(value, default=str)[:60]
