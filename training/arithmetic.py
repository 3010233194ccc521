"""Addition and subtraction: small numbers at once, larger ones digit by digit from the right."""

from random import Random

from training.example import Question

_EASY_BELOW = 100
_HARD_BELOW = 1000
_ADD = (
    "What is {a} + {b}?",
    "{a} + {b}",
    "{a} + {b} = ?",
    "Add {a} and {b}.",
    "What is {a} plus {b}?",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}",
    "How much is {a} + {b}?",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "{a} - {b}",
    "{a} - {b} = ?",
    "Subtract {b} from {a}.",
    "What is {a} minus {b}?",
    "Compute {a} - {b}.",
    "Calculate {a} - {b}",
    "How much is {a} - {b}?",
)


def ask_sum(random: Random) -> Question:
    """An addition of two numbers, mostly below a hundred."""
    a, b, hard = _draw(random)
    return Question(
        task="add",
        key=f"{min(a, b)}+{max(a, b)}",
        user=random.choice(_ADD).format(a=a, b=b),
        reasoning=_sum_steps(a, b),
        answer=f"{a} + {b} = {a + b}",
        hard=hard,
    )


def ask_difference(random: Random) -> Question:
    """A subtraction whose result is not negative, mostly below a hundred."""
    first, second, hard = _draw(random)
    a, b = max(first, second), min(first, second)
    return Question(
        task="subtract",
        key=f"{a}-{b}",
        user=random.choice(_SUBTRACT).format(a=a, b=b),
        reasoning=_difference_steps(a, b),
        answer=f"{a} - {b} = {a - b}",
        hard=hard,
    )


def _draw(random: Random) -> tuple[int, int, bool]:
    hard = random.random() < 0.4
    limit = _HARD_BELOW if hard else _EASY_BELOW
    a, b = random.randrange(limit), random.randrange(limit)
    return a, b, max(a, b) >= _EASY_BELOW


def _digits(number: int, places: int) -> list[int]:
    """Lowest digit first, with zeros up to `places`."""
    return [number // 10**place % 10 for place in range(places)]


def _sum_steps(a: int, b: int) -> str:
    """One line a digit: the digits' sum with the carry, then the result so far."""
    places = len(str(max(a, b)))
    lines, result, carry = list[str](), "", 0
    for x, y in zip(_digits(a, places), _digits(b, places), strict=True):
        total = x + y + carry
        result = f"{total % 10}{result}"
        lines.append(f"{x}+{y}+{carry}={total} {result}")
        carry = total // 10
    return "\n".join(lines)


def _difference_steps(a: int, b: int) -> str:
    """One line a digit: the digits' difference less the borrow, ten more where it would be negative, the result."""
    places = len(str(a))
    lines, result, borrow = list[str](), "", 0
    for x, y in zip(_digits(a, places), _digits(b, places), strict=True):
        lent = 10 if x - y - borrow < 0 else 0
        digit = x + lent - y - borrow
        result = f"{digit}{result}"
        lines.append(f"{x + lent}-{y}-{borrow}={digit} {result}")
        borrow = 1 if lent else 0
    return "\n".join(lines)
