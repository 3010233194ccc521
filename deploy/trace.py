"""The times of one request at the gateway: what the latency metrics are made of."""

from collections.abc import Callable


class RequestTrace:
    """Marks the moments of a request on a monotonic clock, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.received_s = clock()
        self.tokenized_s: float | None = None
        self.dispatched_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    def mark_tokenized(self) -> None:
        """The prompt is validated and encoded."""
        self.tokenized_s = self._clock()

    def mark_dispatched(self) -> None:
        """The request was handed to the back end."""
        self.dispatched_s = self._clock()

    def mark_token(self) -> float:
        """A token of some choice arrived; return the time."""
        now = self._clock()
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now
        return now

    def after_received(self, moment_s: float | None) -> float | None:
        """Seconds from the arrival of the request to a moment, None if that was not reached."""
        return None if moment_s is None else moment_s - self.received_s

    def describe(self) -> str:
        """The moments in milliseconds after arrival, for the log."""
        moments = {
            "tokenized": self.tokenized_s,
            "dispatched": self.dispatched_s,
            "first_token": self.first_token_s,
            "last_token": self.last_token_s,
        }
        known = {name: self.after_received(moment) for name, moment in moments.items()}
        return " ".join(f"{name}={after * 1e3:.2f}ms" for name, after in known.items() if after is not None)
