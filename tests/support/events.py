"""Events of a step one by one, also those that came as columns."""

from collections.abc import Iterable
from typing import TypeVar

from router.request import TokenColumns, TokenEvent

E = TypeVar("E")


def one_by_one(events: Iterable[TokenColumns | E]) -> list[E | TokenEvent]:
    """All of them in order, without columns."""
    found: list[E | TokenEvent] = []
    for event in events:
        if isinstance(event, TokenColumns):
            found += event.events()
        else:
            found.append(event)
    return found
