"""Tool calls in a model's content, however the text is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.tools import ParsedCall, ToolCallParser

XML_CALL = """<tool_call>
<function=add>
<parameter=a>
1
</parameter>
<parameter=note>
two
lines
</parameter>
</function>
</tool_call>"""
PROPERTIES = {
    "a": {"type": "integer"},
    "note": {"type": "string"},
    "ratio": {"type": "number"},
    "deep": {"type": "object"},
    "list": {"anyOf": [{"type": "array"}, {"type": "null"}]},
    "name": {"type": ["string", "null"]},
    "on": {"type": "boolean"},
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": PROPERTIES}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[ParsedCall]]:
    parser = ToolCallParser(TOOLS)
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
        (XML_CALL, "", ["add"]),
        (f"so:\n{XML_CALL}\n{XML_CALL}\n{CALL}", "so:\n", ["add", "add", "add"]),
        (XML_CALL.removesuffix("\n</function>\n</tool_call>"), "", ["add"]),
        ("<tool_call><function=go></function></tool_call>", "", ["go"]),
        ("<tool_call><function=></function></tool_call>", "<tool_call><function=></function></tool_call>", []),
        ("<tool_call><function=go</tool_call>", "<tool_call><function=go</tool_call>", []),
        ("<tool_call><function=go>x</function></tool_call>", "<tool_call><function=go>x</function></tool_call>", []),
        ("a <tool_", "a <tool_", []),
        ("<tool_call>{", "<tool_call>{", []),
    ],
)
def test_calls_are_found_whole_and_by_character(text: str, content: str, names: list[str]) -> None:
    for pieces in ([text], list(text)):
        found, calls = parse(pieces)

        assert (found, [call.name for call in calls]) == (content, names)
        assert [call.index for call in calls] == list(range(len(names)))


@given(
    st.lists(
        st.sampled_from(
            [
                CALL,
                XML_CALL,
                "<function=add>",
                "<parameter=a>",
                "</parameter>",
                "<tool_call>",
                "</tool_call>",
                "<tool",
                "_call>",
                " ",
                "a",
                "{}",
            ]
        ),
        max_size=6,
    )
)
def test_what_is_found_does_not_depend_on_the_pieces(pieces: list[str]) -> None:
    text = "".join(pieces)

    assert parse(pieces) == parse([text]) == parse(list(text))


def test_arguments_are_json() -> None:
    (call,) = parse([CALL])[1]

    assert json.loads(call.arguments) == {"a": 1}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("a", "1", 1),
        ("a", "one", "one"),
        ("a", "1.5", "1.5"),
        ("note", "1", "1"),
        ("note", "", ""),
        ("note", "\n  two\n", "\n  two\n"),
        ("note", "a <b> </c> {", "a <b> </c> {"),
        ("note", "say <parameter=a>1", "say <parameter=a>1"),
        ("note", "say </parameter> and </function> too", "say </parameter> and </function> too"),
        ("ratio", "1.5", 1.5),
        ("ratio", "2", 2),
        ("ratio", "NaN", "NaN"),
        ("deep", '{"x": [1]}', {"x": [1]}),
        ("list", "[1, 2]", [1, 2]),
        ("list", "null", None),
        ("name", "null", None),
        ("name", "7", "7"),
        ("on", "True", True),
        ("on", "false", False),
        ("unknown", "3", "3"),
    ],
)
def test_value_in_xml_gets_the_type_of_the_functions_schema(name: str, text: str, value: object) -> None:
    block = f"<tool_call>\n<function=add>\n<parameter={name}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = parse([block])[1]

    assert json.loads(call.arguments) == {name: value}
    assert type(json.loads(call.arguments)[name]) is type(value)


def xml_call(parameters: str) -> str:
    return f"<tool_call>\n<function=add>\n{parameters}\n</function>\n</tool_call>"


def test_a_value_in_xml_keeps_tags_before_a_further_parameter() -> None:
    text = "<parameter=note>\n<parameter=a>1</parameter> is XML\n</parameter>\n<parameter=a>\n2\n</parameter>"
    (call,) = parse([xml_call(text)])[1]

    assert json.loads(call.arguments) == {"note": "<parameter=a>1</parameter> is XML", "a": 2}


def test_a_parameter_in_xml_that_is_not_closed_goes_on_to_the_next_closing_tag() -> None:
    (call,) = parse([xml_call("<parameter=note>\none\n<parameter=a>\n2\n</parameter>")])[1]

    assert json.loads(call.arguments) == {"note": "one\n<parameter=a>\n2"}


def test_a_parameter_given_twice_makes_no_call() -> None:
    block = xml_call("<parameter=a>\n1\n</parameter>\n<parameter=a>\n2\n</parameter>")

    assert parse([block]) == (block, [])


def test_text_behind_the_last_parameter_makes_no_call() -> None:
    block = xml_call("<parameter=a>\n1\n</parameter> so be it")

    assert parse([block]) == (block, [])


def test_values_in_xml_without_a_schema_are_text() -> None:
    parser = ToolCallParser()
    (call,) = parser.push(XML_CALL).calls

    assert json.loads(call.arguments) == {"a": "1", "note": "two\nlines"}
