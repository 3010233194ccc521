"""Whether a request may enter: bounds on what is in flight and on what waits for its first token."""

from dataclasses import dataclass

from router.errors import ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from router.request import Request, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Bounds of one gateway."""

    max_in_flight: int = 1024
    """Requests admitted and not done."""
    max_queue: int = 256
    """Of these, those without a first token."""
    min_retry_s: float = 0.5
    max_retry_s: float = 30.0
    """Bounds of what a refused client is told to wait."""

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "max_queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"admission.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_retry_s <= self.max_retry_s:
            raise ConfigError(
                f"admission.min_retry_s must be positive and at most max_retry_s, got {self.min_retry_s} and "
                f"{self.max_retry_s}"
            )


class _Pace:
    """How fast places become free, and how many were refused since the last one did."""

    _WEIGHT = 0.1
    """Of the newest gap in the mean: about the last twenty gaps count."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._gap_s = 1.0
        self._refused = 0

    def freed(self, now: float) -> None:
        """A place became free."""
        if self._last_s is not None:
            self._gap_s += self._WEIGHT * (max(now - self._last_s, 0.0) - self._gap_s)
        self._last_s = now
        self._refused = 0

    def wait_s(self, now: float) -> float:
        """Seconds until this refused request may expect a place: behind those refused before it."""
        self._refused += 1
        stalled = 0.0 if self._last_s is None else now - self._last_s
        return self._refused * max(self._gap_s, stalled)


class Admission:
    """Requests in flight at one gateway. Used by one thread; times are unix seconds."""

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        self._config = config or AdmissionConfig()
        self._in_flight: set[RequestId] = set()
        self._queue: set[RequestId] = set()
        self._ends = _Pace()
        self._starts = _Pace()

    @property
    def num_in_flight(self) -> int:
        """Requests admitted and not done."""
        return len(self._in_flight)

    @property
    def num_queued(self) -> int:
        """Requests admitted that have no first token."""
        return len(self._queue)

    def admit(self, request: Request, now: float) -> None:
        """Let a request in; `done` must follow.

        Raises:
            DeadlineExceededError: nobody waits for it any more.
            InvalidRequestError: its id is in flight.
            OverloadedError: a bound is reached; says when to come back.
        """
        if request.deadline_unix_s is not None and request.deadline_unix_s <= now:
            late = now - request.deadline_unix_s
            raise DeadlineExceededError(f"{request.id}: deadline passed {late:.3f} s ago; send it with a later one")
        if request.id in self._in_flight:
            raise InvalidRequestError(f"request id {request.id} is in flight already; use a new one", field="id")
        if len(self._in_flight) >= self._config.max_in_flight:
            raise self._overloaded("max_in_flight", self._config.max_in_flight, self._ends, now)
        if len(self._queue) >= self._config.max_queue:
            raise self._overloaded("max_queue", self._config.max_queue, self._starts, now)
        self._in_flight.add(request.id)
        self._queue.add(request.id)

    def started(self, request_id: RequestId, now: float) -> None:
        """The request has its first token: it leaves the queue. More calls change nothing."""
        if request_id in self._queue:
            self._queue.remove(request_id)
            self._starts.freed(now)

    def done(self, request_id: RequestId, now: float) -> None:
        """The request ended, however it did; ids that are not in flight change nothing."""
        if request_id in self._in_flight:
            self.started(request_id, now)
            self._in_flight.remove(request_id)
            self._ends.freed(now)

    def _overloaded(self, bound: str, value: int, pace: _Pace, now: float) -> OverloadedError:
        retry_s = min(max(pace.wait_s(now), self._config.min_retry_s), self._config.max_retry_s)
        return OverloadedError(
            f"admission.{bound}={value} requests reached; try again in {retry_s:.1f} s", retry_after_s=retry_s
        )
