"""Bodies of the HTTP API: what is refused, and by which name."""

import json
import time

import pytest

from deploy.chat import ChatPrompt
from deploy.openai_input import chat_input, completion_input, parse_body
from deploy.schema import ChatRequest, CompletionRequest
from deploy.validation import TextPrompts, TokenPrompts
from router.errors import InvalidRequestError

USER = {"role": "user", "content": "hi"}


def chat(**fields: object) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"model": "tiny", "messages": [USER], **fields}).encode())


def completion(**fields: object) -> CompletionRequest:
    return parse_body(CompletionRequest, json.dumps({"model": "tiny", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"user": "me"}, "user"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": "2"}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{**USER, "name": "bob"}]}, "messages[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"messages": [{"role": "assistant", "content": "no", "refusal": "no"}]}, "messages[0].refusal"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs.documents"),
    ],
)
def test_an_unknown_or_wrongly_typed_field_is_refused_by_its_path(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)

    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_what_completions_cannot_do_is_refused_by_name(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "["}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_input(chat(**fields), tenant="", deadline_unix_s=None)

    assert caught.value.field == field


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"model":"\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatRequest, body)

    assert caught.value.field == "body"


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidRequestError):
        parse_body(ChatRequest, b'{"model": "tiny", "messages": [], "temperature": NaN}')


def test_errors_never_repeat_a_long_value() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(temperature="x" * 10_000)

    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", TextPrompts(texts=("hi",))),
        (["a", "b"], TextPrompts(texts=("a", "b"))),
        ([1, 2], TokenPrompts(token_ids=((1, 2),))),
        ([[1, 2], [3]], TokenPrompts(token_ids=((1, 2), (3,)))),
    ],
)
def test_a_prompt_is_text_or_token_ids_one_or_several(prompt: object, expected: TextPrompts | TokenPrompts) -> None:
    assert completion_input(completion(prompt=prompt), tenant="", deadline_unix_s=None).prompt == expected


def test_null_means_not_given() -> None:
    given = chat_input(chat(temperature=None, stop=None, n=None, seed=None), tenant="", deadline_unix_s=None)

    assert (given.sampling.temperature, given.stop, given.n, given.sampling.seed) == (None, (), 1, None)


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    given = chat_input(chat(messages=[{"role": "user", "content": parts}]), tenant="", deadline_unix_s=None)

    assert isinstance(given.prompt, ChatPrompt)
    assert given.prompt.messages[0].content == "<|im_end|>"


def test_tools_are_not_shown_to_the_model_when_it_may_not_call_them() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice, count in (("none", 0), ("auto", 1), (None, 1)):
        given = chat_input(chat(tools=tools, tool_choice=choice), tenant="", deadline_unix_s=None)

        assert isinstance(given.prompt, ChatPrompt)
        assert len(given.prompt.tools) == count


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stop": [1] * 300_000}, "stop[0]"),
        ({"prompt": [1, *["a"] * 300_000]}, "prompt"),
        ({f"k{i}": 1 for i in range(100_000)}, "body"),
        ({"logit_bias": {str(i): "x" for i in range(100_000)}}, "body"),
    ],
    ids=["list", "prompt", "unknown fields", "object"],
)
def test_a_body_wrong_in_every_item_is_refused_as_fast_as_it_is_read(fields: dict[str, object], field: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "hi", **fields}).encode()
    began = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(CompletionRequest, body)
    assert time.process_time() - began < 1.0
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64 levels"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested deeper than 64 levels"),
        ('{"a":"\\ud800"}', "is not JSON in Unicode"),
        ('{"\\udc00":1}', "is not JSON in Unicode"),
        ("[1]", "must be a JSON object"),
        ("{", "is not JSON in Unicode"),
    ],
)
def test_tool_arguments_that_no_template_could_render_are_refused(arguments: str, told: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    body = chat(messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(InvalidRequestError, match=told) as caught:
        chat_input(body, tenant="", deadline_unix_s=None)
    assert caught.value.field == "messages[1].tool_calls[0].function.arguments"
