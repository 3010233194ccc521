"""Values that take long to make, kept for the keys that come up again; shared by threads."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class MadeOnce(Generic[Key, Value]):
    """Makes a value once for each key; who asks meanwhile waits for it.

    Args:
        make: a key's value.
        most: values kept; the oldest are dropped first.
    """

    def __init__(self, make: Callable[[Key], Value], *, most: int) -> None:
        self._make = make
        self._most = most
        self._values: dict[Key, Value] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value:
        """The key's value; raises what `make` raises."""
        with self._lock:
            if key not in self._values:
                self._values[key] = self._make(key)
                if len(self._values) > self._most:
                    del self._values[next(iter(self._values))]
            return self._values[key]
