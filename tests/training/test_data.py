"""What the demo models learn from and are tested on."""

import json
import re
from itertools import islice

from training.data import examples
from training.example import Example


def draw(number: int, *, held_out: bool = False, seed: str = "a") -> list[Example]:
    return list(islice(examples(seed, held_out=held_out), number))


def last_user(example: Example) -> str:
    return str(example.messages[-1]["content"])


def test_equal_seeds_draw_equal_conversations() -> None:
    assert draw(50) == draw(50)
    assert draw(50) != draw(50, seed="b")


def test_no_test_prompt_is_in_the_training_data() -> None:
    trained = {last_user(example) for example in draw(5000) if example.task not in ("chat", "tool_answer")}
    tested = {last_user(example) for example in draw(500, held_out=True) if example.task != "tool_answer"}
    assert trained & tested == set()


def test_sums_and_differences_are_right_and_their_steps_end_in_the_result() -> None:
    found = [example for example in draw(2000) if example.task in ("add", "subtract")]
    assert len(found) > 500
    for example in found:
        match = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", example.answer)
        assert match is not None
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        assert result == (a + b if match[2] == "+" else a - b)
        if example.thinking:
            last_step = example.completion.split("\n</think>")[0].splitlines()[-1]
            written = last_step.split(" ")[1]
            carry = int(last_step.split("=")[1].split(" ")[0]) // 10
            assert int(f"{carry or ''}{written}") == result


def test_sorted_lists_hold_the_items_of_the_question() -> None:
    for example in draw(1000):
        if example.task == "sort":
            items = example.answer.split(", ")
            asked = re.findall(r"\b(?:[a-z]|\d+)\b", last_user(example))
            assert sorted(asked) == sorted(items)


def test_a_tool_call_names_an_offered_tool_with_all_its_arguments() -> None:
    calls = [example for example in draw(3000) if example.task == "tool_call"]
    assert len(calls) > 30
    for example in calls:
        call = json.loads(example.answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        functions = [tool["function"] for tool in example.tools]
        assert all(isinstance(function, dict) for function in functions)
        (function,) = [each for each in functions if isinstance(each, dict) and each["name"] == call["name"]]
        assert list(call["arguments"]) == function["parameters"]["required"]


def test_thinking_is_what_the_completion_begins_with_and_the_answer_what_it_ends_with() -> None:
    for example in draw(500):
        assert example.completion.startswith("<think>\n") == example.thinking
        assert example.completion.endswith(example.answer)
