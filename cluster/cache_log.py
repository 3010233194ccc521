"""What a member's prefix cache took in and let go, numbered, for gateways that each know it up to some point."""

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from router.load import CacheEvents


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheChanges:
    """How one lane's cache changed: by hash, True where something can be found now, False where it is gone."""

    kv: Mapping[int, bool] = field(default_factory=dict)
    states: Mapping[int, bool] = field(default_factory=dict)


class CacheLog:
    """The changes since the start, as far back as there is room, and what the cache holds now for those further back.

    One thread records, any thread reads.

    Args:
        max_hashes: changes kept; whoever is further behind gets a snapshot.
        page_hashes: of one CacheEvents, at most.
    """

    def __init__(self, *, max_hashes: int = 65_536, page_hashes: int = 65_536) -> None:
        self._max_hashes = max_hashes
        self._page_hashes = page_hashes
        self._lock = threading.Lock()
        self._kv: dict[int, int] = {}
        self._states: dict[int, int] = {}
        self._entries: deque[CacheEvents] = deque()
        self._num_hashes = 0
        self._sequence = 0

    def record(self, lanes: Sequence[CacheChanges]) -> None:
        """Take what changed in each lane; a block counts as held while any lane holds it."""
        if not any(changes.kv or changes.states for changes in lanes):
            return
        with self._lock:
            stored, removed = _merge(self._kv, [changes.kv for changes in lanes])
            stored_states, removed_states = _merge(self._states, [changes.states for changes in lanes])
            count = len(stored) + len(removed) + len(stored_states) + len(removed_states)
            if count:
                self._append(
                    CacheEvents(
                        after=self._sequence,
                        sequence=self._sequence + 1,
                        stored=stored,
                        removed=removed,
                        stored_states=stored_states,
                        removed_states=removed_states,
                    )
                )

    def _append(self, entry: CacheEvents) -> None:
        self._sequence = entry.sequence
        self._entries.append(entry)
        self._num_hashes += _size(entry)
        while self._num_hashes > self._max_hashes:
            self._num_hashes -= _size(self._entries.popleft())

    def since(self, sequence: int | None) -> list[CacheEvents]:
        """What brings a reader up to date.

        Args:
            sequence: what it knows; None: nothing.

        Returns:
            The changes since, or a snapshot in pages where these are not known any more; empty when it is up to date.
        """
        with self._lock:
            behind = self._sequence - sequence if sequence is not None else -1
            if 0 <= behind <= len(self._entries):
                return list(islice(self._entries, len(self._entries) - behind, None))
            return self._snapshot()

    def _snapshot(self) -> list[CacheEvents]:
        at, size = self._sequence, self._page_hashes
        pages = [CacheEvents(after=at, sequence=at, cleared=True)]
        kv, states = tuple(self._kv), tuple(self._states)
        pages += [CacheEvents(after=at, sequence=at, stored=page) for page in _pages(kv, size)]
        pages += [CacheEvents(after=at, sequence=at, stored_states=page) for page in _pages(states, size)]
        return pages


def _merge(held: dict[int, int], lanes: Iterable[Mapping[int, bool]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Enter the lanes' changes in `held`, a bit set of lanes by hash -> hashes that no lane had, that none has now."""
    before: dict[int, bool] = {}
    for lane, changes in enumerate(lanes):
        for value, present in changes.items():
            old = held.get(value, 0)
            before.setdefault(value, old > 0)
            new = old | 1 << lane if present else old & ~(1 << lane)
            if new:
                held[value] = new
            else:
                held.pop(value, None)
    stored = tuple(value for value, was in before.items() if value in held and not was)
    return stored, tuple(value for value, was in before.items() if was and value not in held)


def _pages(hashes: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(hashes[start : start + size]) for start in range(0, len(hashes), size)]


def _size(entry: CacheEvents) -> int:
    return len(entry.stored) + len(entry.removed) + len(entry.stored_states) + len(entry.removed_states)
