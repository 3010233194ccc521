"""LoadProgress: shows how far weights are read, as a bar for a person and as log lines otherwise."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Never, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 5.0


class LoadProgress:
    """Called with (bytes read, bytes to read); the second number may change. A context manager: leaving it ends it."""

    def __init__(self, name: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            name: what is loaded.
            stream: a bar is drawn here if it is a terminal; standard error by default.
            clock: seconds.
        """
        self._name = name
        self._stream = stream or sys.stderr
        self._clock = clock
        self._began = self._logged = clock()
        self._done_bytes = 0
        self._bar: tqdm[Never] | None = None
        if self._stream.isatty():
            self._bar = tqdm(desc=name, unit="B", unit_scale=True, file=self._stream, leave=False, mininterval=0)

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Tell that done_bytes of total_bytes are read."""
        step, self._done_bytes = done_bytes - self._done_bytes, done_bytes
        now = self._clock()
        if self._bar is not None:
            self._bar.total = total_bytes
            self._bar.set_postfix_str(f"{self._rate(now):.2f} GB/s", refresh=False)
            self._bar.update(step)
        elif now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            share = 100 * done_bytes / max(total_bytes, 1)
            logger.info("%s: %.2f GB read, %.0f%%, %.2f GB/s", self._name, done_bytes / 1e9, share, self._rate(now))

    def __enter__(self) -> "LoadProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            now = self._clock()
            logger.info(
                "%s: read %.3f GB in %.1f s, %.2f GB/s",
                self._name,
                self._done_bytes / 1e9,
                now - self._began,
                self._rate(now),
            )

    def _rate(self, now: float) -> float:
        return self._done_bytes / 1e9 / max(now - self._began, 1e-9)
