"""How fast a fleet goes when it has all it can do."""

from math import exp
from typing import Final

_RATE_S: Final = 10.0
"""Over which the pace is averaged."""
_LEAST_S: Final = 0.5
"""Of having enough to do before the pace counts."""


class Pace:
    """Tokens a second, measured only while something waits: what comes in quiet times says nothing of what could.

    Used by one thread; times are unix seconds.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._busy_s: float | None = None
        """Up to when busy time is counted; None: nothing waits."""

    @property
    def per_s(self) -> float | None:
        """Of late; None: not known yet."""
        return self._tokens / self._seconds if self._seconds >= _LEAST_S else None

    def watch(self, now: float, *, waiting: bool) -> None:
        """Something waits, or nothing does."""
        self._pass(now)
        self._busy_s = now if waiting else None

    def take(self, tokens: int, now: float) -> None:
        """So much was done; it counts if something waits."""
        self._pass(now)
        if self._busy_s is not None:
            self._tokens += tokens

    def _pass(self, now: float) -> None:
        """Average exponentially over busy time: of tokens and seconds alike, so that a short time is no small one."""
        if self._busy_s is not None and now > self._busy_s:
            fade = exp((self._busy_s - now) / _RATE_S)
            self._tokens *= fade
            self._seconds = self._seconds * fade + _RATE_S * (1.0 - fade)
            self._busy_s = now
