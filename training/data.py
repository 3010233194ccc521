"""Draws whole conversations from all tasks by a seed; training and test conversations never ask the same thing."""

from collections.abc import Callable, Iterator
from itertools import count
from random import Random

from training.arithmetic import ask_difference, ask_sum
from training.example import Example, Message, Question, complete, is_held_out
from training.facts import ask_fact
from training.lists import ask_count, ask_reverse, ask_sort
from training.small_talk import ask_small_talk
from training.tool_use import Json, ask_after_response, ask_for_call, ask_without_tool, offered

_PLAIN: tuple[tuple[int, Callable[[Random], Question]], ...] = (
    (26, ask_sum),
    (26, ask_difference),
    (20, ask_sort),
    (8, ask_reverse),
    (12, ask_count),
    (12, ask_fact),
    (4, ask_small_talk),
)
_TOOL_SHARE = 0.07
_HISTORY_SHARE = 0.06
_SPARE_TOOLS_SHARE = 0.02


def examples(seed: str, *, held_out: bool) -> Iterator[Example]:
    """Endless conversations of one side of the split; equal seeds give equal ones."""
    for index in count():
        # By index, so that no draw depends on those before it.
        random = Random(f"{seed} {held_out} {index}")
        example = _draw(random, held_out)
        if example is not None:
            yield example


def _draw(random: Random, held_out: bool) -> Example | None:
    thinking = random.random() < 0.5
    if random.random() < _TOOL_SHARE:
        example, key = _draw_tool_use(random, thinking)
    else:
        question = _draw_plain(random)
        history = _history(random) if random.random() < _HISTORY_SHARE else ()
        spare = offered(random, None) if random.random() < _SPARE_TOOLS_SHARE else ()
        messages = (*history, *_asked(question))
        example, key = _example(question, messages, thinking or question.hard, spare), question.key
    # Small talk has no key and is never held out.
    return example if (bool(key) and is_held_out(key)) == held_out else None


def _draw_plain(random: Random) -> Question:
    weights = [weight for weight, _ in _PLAIN]
    ((_, ask),) = random.choices(_PLAIN, weights)
    return ask(random)


def _draw_tool_use(random: Random, thinking: bool) -> tuple[Example, str]:
    kind = random.random()
    if kind < 0.6:
        question, tool = ask_for_call(random)
        return _example(
            question, ({"role": "user", "content": question.user},), thinking, offered(random, tool)
        ), question.key
    if kind < 0.7:
        question = ask_without_tool(random)
        return _example(question, _asked(question), thinking, ()), question.key
    question, tool, messages = ask_after_response(random)
    return _example(question, messages, thinking, offered(random, tool)), question.key


def _asked(question: Question) -> tuple[Message, ...]:
    return ({"role": "user", "content": question.user},)


def _history(random: Random) -> tuple[Message, ...]:
    """One or two earlier questions with their answers."""
    turns: list[Message] = []
    for _ in range(random.randint(1, 2)):
        question = _draw_plain(random)
        turns += _asked(question)
        turns.append({"role": "assistant", "content": question.answer})
    return tuple(turns)


def _example(question: Question, messages: tuple[Message, ...], thinking: bool, tools: tuple[Json, ...]) -> Example:
    return Example(
        task=question.task,
        messages=messages,
        tools=tools,
        thinking=thinking,
        completion=complete(question, thinking=thinking),
        answer=question.answer,
    )
