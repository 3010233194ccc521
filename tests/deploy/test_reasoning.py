"""Reasoning and content, however the text is cut."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deploy.reasoning import ReasoningSplitter


def split(pieces: list[str], *, thinking: bool = True) -> tuple[str, str]:
    splitter = ReasoningSplitter(thinking=thinking)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("a</think>b", "a", "b"),
        ("<think>\na\n</think>\n\nb", "a\n", "b"),
        ("a", "a", ""),
        ("<think>", "", ""),
        ("<thi", "<thi", ""),
        ("a</think>b</think>c", "a", "bc"),
        ("a<tool_call>b", "a", "<tool_call>b"),
        ("</think>", "", ""),
        ("a</thin", "a</thin", ""),
        ("a</think>b</thin", "a", "b</thin"),
        ("a <think> b</think>c", "a <think> b", "c"),
        ("a</think></th</think>ink>b", "a", "</think>b"),
    ],
)
def test_text_is_split_by_the_rules_whole_and_by_character(text: str, reasoning: str, content: str) -> None:
    assert split([text]) == (reasoning, content)
    assert split(list(text)) == (reasoning, content)


@example(["</think>", "</th", "</think>", "ink>"])
@given(st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</th", "ink>", "<", "\n", "a"]), max_size=8))
def test_the_split_does_not_depend_on_the_pieces(pieces: list[str]) -> None:
    text = "".join(pieces)

    assert split(pieces) == split([text]) == split(list(text))


def test_without_thinking_all_is_content() -> None:
    assert split(["a</think>b"], thinking=False) == ("", "a</think>b")
