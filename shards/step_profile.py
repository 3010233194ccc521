"""Where the time of a rank's steps goes, part by part, for whoever asks; costs nothing where nobody does."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Final, Literal, ParamSpec, TypeVar, cast

from shards.comm import Comm, Comms
from shards.kernels.interface import Kernels

StepKind = Literal["decode", "prefill"]
OTHER: Final = "other"
"""Between parts: Python and small tensor operations of the model."""

P = ParamSpec("P")
R = TypeVar("R")


class StepProfile:
    """Seconds by kind of step and part, written by the rank's thread.

    Parts do not overlap: what runs inside of a part is that part's, so that an operator in the head counts as head.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[StepKind, str], float] = {}
        self.steps: dict[StepKind, int] = {}
        self._kind: StepKind = "prefill"
        self._inside = False
        self._told_until = 0.0
        """End of the latest part, 0 before the first."""

    def reset(self) -> None:
        """Forget what was measured; between two steps."""
        self.seconds = {}
        self.steps = {}
        self._told_until = 0.0

    def begin(self, kind: StepKind) -> None:
        """A step begins; what is measured from now on belongs to its kind."""
        self._kind = kind
        self.steps[kind] = self.steps.get(kind, 0) + 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the context's time as that of `name`, unless a part is open already."""
        if self._inside:
            yield
            return
        self._inside = True
        started = time.perf_counter()
        if self._told_until:
            self._add(OTHER, started - self._told_until)
        try:
            yield
        finally:
            self._told_until = time.perf_counter()
            self._add(name, self._told_until - started)
            self._inside = False

    def _add(self, name: str, seconds: float) -> None:
        key = (self._kind, name)
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def timed_kernels(self, kernels: Kernels) -> Kernels:
        """The same operators, each a part by its name."""
        return cast("Kernels", _Timed(kernels, self))

    def timed_comms(self, comms: Comms) -> Comms:
        """The same groups, each operation a part by its name; groups of one rank as they are."""

        def timed(comm: Comm) -> Comm:
            return comm if comm.size == 1 else cast("Comm", _Timed(comm, self))

        return Comms(tp=timed(comms.tp), dp=timed(comms.dp), world=timed(comms.world))


class _Timed:
    """Stands for an object; calls of its methods are parts of a profile."""

    def __init__(self, inner: object, profile: StepProfile) -> None:
        self._inner = inner
        self._profile = profile

    def __getattr__(self, name: str) -> object:
        found = getattr(self._inner, name)
        if not callable(found):
            return found
        timed = self._timed(name, found)
        # Found without this method from now on.
        setattr(self, name, timed)
        return timed

    def _timed(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        @wraps(call)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._profile.part(name):
                return call(*args, **kwargs)

        return timed


def part(profile: StepProfile | None, name: str) -> AbstractContextManager[None]:
    """`profile.part(name)` where there is a profile."""
    return nullcontext() if profile is None else profile.part(name)
