"""How far the step that runs has come, for those who read what its layers write."""

import threading
from typing import Final

ALL_LAYERS: Final = 1 << 20
"""More than any model has: the step has ended."""


class StepProgress:
    """Told by the thread that runs the steps, asked by others. Numbers of steps grow."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._step = -1
        self._layers = 0

    def begin(self, step: int) -> None:
        """A step begins."""
        self._tell(step, 0)

    def wrote(self, layers: int) -> None:
        """So many of the step's attention layers have written their KV."""
        self._tell(self._step, layers)

    def end(self) -> None:
        """All that the step writes is there."""
        self._tell(self._step, ALL_LAYERS)

    def _tell(self, step: int, layers: int) -> None:
        with self._changed:
            self._step, self._layers = step, layers
            self._changed.notify_all()

    def wait(self, step: int, layers: int, timeout_s: float) -> int:
        """Wait until more than so many layers of a step are there -> how many are, or no more after timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: self._written(step) > layers, timeout_s)
            return self._written(step)

    def _written(self, step: int) -> int:
        if self._step == step:
            return self._layers
        return ALL_LAYERS if self._step > step else 0
