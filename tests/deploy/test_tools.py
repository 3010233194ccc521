"""Tool calls in a model's content, however the text is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.tools import ParsedCall, ToolCallParser

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[ParsedCall]]:
    parser = ToolCallParser()
    parts = [parser.push(piece) for piece in pieces] + [parser.finish()]
    return "".join(part.content for part in parts), [call for part in parts for call in part.calls]


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("hello", "hello", []),
        (CALL, "", ["add"]),
        (f"so:\n{CALL}\n{CALL}\n", "so:\n", ["add", "add"]),
        (f"{CALL} done", "done", ["add"]),
        (CALL.removesuffix("</tool_call>"), "", ["add"]),
        ("<tool_call>{oops</tool_call>", "<tool_call>{oops</tool_call>", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ('<tool_call>["add"]</tool_call>', '<tool_call>["add"]</tool_call>', []),
        ("a <tool_", "a <tool_", []),
        ("<tool_call>{", "<tool_call>{", []),
    ],
)
def test_calls_are_found_whole_and_by_character(text: str, content: str, names: list[str]) -> None:
    for pieces in ([text], list(text)):
        found, calls = parse(pieces)

        assert (found, [call.name for call in calls]) == (content, names)
        assert [call.index for call in calls] == list(range(len(names)))


@given(st.lists(st.sampled_from([CALL, "<tool_call>", "</tool_call>", "<tool", "_call>", " ", "a", "{}"]), max_size=6))
def test_what_is_found_does_not_depend_on_the_pieces(pieces: list[str]) -> None:
    text = "".join(pieces)

    assert parse(pieces) == parse([text]) == parse(list(text))


def test_arguments_are_json() -> None:
    (call,) = parse([CALL])[1]

    assert json.loads(call.arguments) == {"a": 1}
