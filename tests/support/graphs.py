"""A recorder for `DecodeGraphs` that needs no GPU."""

from collections.abc import Callable

from torch import Tensor


class Rerun:
    """Records by keeping the function; its result lies where it lay when recorded.

    Args:
        broken: how many records fail first.
        off_by: how far each replay is off.
    """

    def __init__(self, *, broken: int = 0, off_by: float = 0.0) -> None:
        self.records = 0
        self._broken = broken
        self._off_by = off_by

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As `Recorder`."""
        self.records += 1
        if self.records <= self._broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = run()

        def again() -> None:
            result.copy_(run())
            if self._off_by:
                result.add_(self._off_by)

        return again, result
