"""Where the time of a rank's steps goes, part by part, for whoever asks; costs nothing where nobody does."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Final, Literal, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from shards.comm import Comm, Comms
from shards.kernels.interface import Kernels

StepKind = Literal["decode", "prefill"]
COLLECTIVES: Final = "collectives"
"""The part that operations of groups are, in whatever part they run: also the wait for slower ranks."""
Label = tuple[str, ...]
"""A part, then what it is inside of it, such as ("attention", "linear"); () is between parts."""

P = ParamSpec("P")
R = TypeVar("R")


class StepProfile:
    """Seconds by kind of step and label, written by the rank's thread.

    What a part takes is told without the parts inside of it, so that all seconds together are the time that passed.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[StepKind, Label], float] = {}
        self.steps: dict[StepKind, int] = {}
        self.path: Label = ()
        """The part that runs."""
        self._kind: StepKind = "prefill"
        self._told_until = 0.0
        """Until when seconds are told, 0 before the first."""

    def reset(self) -> None:
        """Forget what was measured; between two steps. What passes before the next one counts as prefill."""
        self.seconds = {}
        self.steps = {}
        self._kind = "prefill"
        self._told_until = time.perf_counter()

    def begin(self, kind: StepKind) -> None:
        """A step begins; what is measured from now on belongs to its kind."""
        self._kind = kind
        self.steps[kind] = self.steps.get(kind, 0) + 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the context's time as that of `name`, within the part that runs; collectives stand for themselves."""
        outer = self.path
        self._tell()
        self.path = (name,) if name == COLLECTIVES else (*outer, name)
        try:
            yield
        finally:
            self._tell()
            self.path = outer

    def add_calls(self, labels: Sequence[Label], ns: NDArray[np.int64]) -> None:
        """Count calls that were timed elsewhere, within the time since anything was counted last."""
        for label, nanoseconds in zip(labels, ns.tolist(), strict=True):
            self._add(label, nanoseconds * 1e-9)
        self._add(self.path, -float(ns.sum()) * 1e-9)

    def _tell(self) -> None:
        now = time.perf_counter()
        if self._told_until:
            self._add(self.path, now - self._told_until)
        self._told_until = now

    def _add(self, label: Label, seconds: float) -> None:
        key = (self._kind, label)
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

    def timed_kernels(self, kernels: Kernels) -> Kernels:
        """The same operators, each a part by its name."""
        return cast("Kernels", _Timed(kernels, self.part))

    def timed_comms(self, comms: Comms) -> Comms:
        """The same groups, each operation a part of the collectives; groups of one rank as they are."""

        @contextmanager
        def operation(name: str) -> Iterator[None]:
            with self.part(COLLECTIVES), self.part(name):
                yield

        def timed(comm: Comm) -> Comm:
            return comm if comm.size == 1 else cast("Comm", _Timed(comm, operation))

        return Comms(tp=timed(comms.tp), dp=timed(comms.dp), world=timed(comms.world))


class _Timed:
    """Stands for an object; calls of its methods are parts of a profile."""

    def __init__(self, inner: object, part: Callable[[str], AbstractContextManager[None]]) -> None:
        self._inner = inner
        self._part = part

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
            with self._part(name):
                return call(*args, **kwargs)

        return timed


def part(profile: StepProfile | None, name: str) -> AbstractContextManager[None]:
    """`profile.part(name)` where there is a profile."""
    return nullcontext() if profile is None else profile.part(name)
