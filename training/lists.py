"""Lists of numbers, letters and words: sort them, reverse them, count in them."""

from collections.abc import Sequence
from random import Random

from training.example import Question
from training.words import LETTERS, THINGS

_SORT = ("Sort these {kind}: {list}", "Sort the {kind} {list}", "Put these {kind} in order: {list}", "Sort: {list}")
_SORT_DOWN = ("Sort these {kind} in descending order: {list}", "Sort from largest to smallest: {list}")
_REVERSE = (
    "Reverse this list: {list}",
    "Reverse the order of: {list}",
    "Write this backwards: {list}",
    "Reverse: {list}",
)
_COUNT_ALL = (
    "How many {kind} are in this list: {list}",
    "How many {kind} are there: {list}",
    "Count the {kind}: {list}",
)
_COUNT_ONE = (
    "How many times does {one} appear in this list: {list}",
    "How often is {one} in this list: {list}",
    "Count {one} in: {list}",
)


def ask_sort(random: Random) -> Question:
    """Up to five different numbers below a hundred, or up to six letters; numbers sometimes largest first."""
    numbers = random.random() < 0.6
    descending = numbers and random.random() < 0.25
    drawn: list[int] | list[str]
    drawn = random.sample(range(100), random.randint(2, 5)) if numbers else random.sample(LETTERS, random.randint(2, 6))
    items = [str(item) for item in drawn]
    ordered = [str(item) for item in sorted(drawn, reverse=descending)]
    text = ", ".join(items)
    form = random.choice(_SORT_DOWN if descending else _SORT)
    return Question(
        task="sort",
        key=f"sort {descending} {text}",
        user=form.format(kind="numbers" if numbers else "letters", list=text),
        reasoning=_sort_steps(items, ordered),
        answer=", ".join(ordered),
    )


def _sort_steps(items: Sequence[str], ordered: Sequence[str]) -> str:
    """Pick the next one out of those that are left."""
    left, lines = list(items), list[str]()
    for item in ordered:
        lines.append(f"{', '.join(left)}: {item}")
        left.remove(item)
    return "\n".join(lines)


def ask_reverse(random: Random) -> Question:
    """Two to seven words, letters or numbers, last one first."""
    items, _ = _draw(random, random.randint(2, 7))
    text = ", ".join(items)
    return Question(
        task="reverse",
        key=f"reverse {text}",
        user=random.choice(_REVERSE).format(list=text),
        reasoning=f"The last is {items[-1]}, the first is {items[0]}.",
        answer=", ".join(reversed(items)),
    )


def ask_count(random: Random) -> Question:
    """How long a list is, or how often one of its items is in it."""
    items, kind = _draw(random, random.randint(2, 8))
    if random.random() < 0.5:
        text = ", ".join(items)
        return Question(
            task="count",
            key=f"count {text}",
            user=random.choice(_COUNT_ALL).format(kind=kind, list=text),
            reasoning="\n".join(f"{number} {item}" for number, item in enumerate(items, start=1)),
            answer=str(len(items)),
        )
    one, others = items[0], items[1:4]
    items = [random.choice([one, *others]) for _ in items]
    text, found = ", ".join(items), items.count(one)
    return Question(
        task="count",
        key=f"count {one} in {text}",
        user=random.choice(_COUNT_ONE).format(one=one, list=text),
        reasoning="\n".join(f"{number} {one}" for number in range(1, found + 1)) or f"There is no {one}.",
        answer=str(found),
    )


def _draw(random: Random, length: int) -> tuple[list[str], str]:
    """Different items of one kind, and the kind's name."""
    kind = random.choice(("words", "words", "letters", "numbers"))
    if kind == "numbers":
        return [str(number) for number in random.sample(range(100), length)], kind
    return random.sample(LETTERS if kind == "letters" else THINGS, length), kind
