"""Which members of a pool hold which cached blocks, by hash: one dictionary of bit sets over all of them.

A block's hash covers everything before it, so the members that hold block i of a prompt are, but for blocks evicted
in between, among those that hold block i - 1: the sets shrink with depth, and a search for the places where they
change needs few look-ups however long the prompt. What an eviction in between hides costs a worse guess, no more.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What one member is known to hold."""

    kv: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """A prompt that was routed to a member and will soon be in its cache."""

    bit: int
    until_s: float
    hashes: Sequence[int]


class PrefixIndex:
    """Members are numbers from 0 on, here and in each bit set. Used by one thread; times are unix seconds.

    Args:
        max_expected: block hashes of routed prompts remembered at once; the oldest are forgotten first.
    """

    def __init__(self, *, max_expected: int) -> None:
        self._kv: dict[int, int] = {}
        self._states: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._expected: dict[int, _Expected] = {}
        self._order: deque[_Expected] = deque()
        self._num_expected = 0
        self._max_expected = max_expected

    def __len__(self) -> int:
        """Different blocks known."""
        return len(self._kv)

    def store(self, member: int, hashes: Iterable[int], states: Iterable[int]) -> None:
        """The member's cache took these in."""
        held = self._held.setdefault(member, _Held())
        _add(self._kv, held.kv, hashes, 1 << member)
        _add(self._states, held.states, states, 1 << member)

    def remove(self, member: int, hashes: Iterable[int], states: Iterable[int]) -> None:
        """The member's cache let these go; unknown ones are no error."""
        held = self._held.setdefault(member, _Held())
        _discard(self._kv, held.kv, hashes, 1 << member)
        _discard(self._states, held.states, states, 1 << member)

    def clear(self, member: int) -> None:
        """The member's cache is empty, or it left."""
        held = self._held.pop(member, None)
        if held is not None:
            _discard(self._kv, held.kv, tuple(held.kv), 1 << member)
            _discard(self._states, held.states, tuple(held.states), 1 << member)
        for entry in self._order:
            if entry.bit == 1 << member:
                self._unexpect(entry)

    def held(self, member: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """By its own word: blocks whose KV it holds, and blocks behind which it holds a recurrent state."""
        held = self._held.get(member, _Held())
        return tuple(held.kv), tuple(held.states)

    def expect(self, member: int, hashes: Sequence[int], until_s: float) -> None:
        """The member will soon hold these; its own word replaces this from `until_s` on."""
        entry = _Expected(bit=1 << member, until_s=until_s, hashes=hashes)
        self._expected.update(dict.fromkeys(hashes, entry))
        self._order.append(entry)
        self._num_expected += len(hashes)
        while self._num_expected > self._max_expected:
            self._forget_oldest()

    def forget(self, now: float) -> None:
        """Drop expectations that were not confirmed in their time."""
        while self._order and self._order[0].until_s <= now:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        entry = self._order.popleft()
        self._num_expected -= len(entry.hashes)
        self._unexpect(entry)

    def _unexpect(self, entry: _Expected) -> None:
        expected = self._expected
        for value in entry.hashes:
            if expected.get(value) is entry:
                del expected[value]

    def depths(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Who holds how much of a prompt's KV.

        Returns:
            Pairs (depth, members): these members hold the first `depth` blocks and not the one behind; deepest first,
            each member at most once.
        """
        kv, expected = self._kv.get, self._expected.get

        def holders(index: int) -> int:
            value = hashes[index]
            entry = expected(value)
            return kv(value, 0) if entry is None else kv(value, 0) | entry.bit

        first = holders(0) if hashes else 0
        if not first:
            return []
        end = len(hashes) - 1
        seen = last = holders(end)
        found = [(end + 1, last)] if last else []
        # Spans (from, its holders, to, its holders) whose ends differ have a change between them.
        spans = [(0, first, end, last)]
        while spans:
            low, upper, high, lower = spans.pop()
            if high - low > 1 and upper != lower:
                middle = (low + high) // 2
                between = holders(middle)
                spans.append((low, upper, middle, between))
                spans.append((middle, between, high, lower))
            elif upper & ~seen:
                found.append((high, upper & ~seen))
                seen |= upper
        return found

    def state_depths(self, hashes: Sequence[int], depths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `depths`, of members that can only go on where KV reaches a recurrent state.

        Args:
            hashes: of the prompt's blocks.
            depths: what `depths` returned for them.
        """
        found: list[tuple[int, int]] = []
        waiting = 0
        entries = iter((*depths, (0, 0)))
        below, joining = next(entries)
        for depth in range(below, 0, -1):
            while depth == below:
                waiting |= joining
                below, joining = next(entries)
            usable = self._state_holders(hashes[depth - 1]) & waiting
            if usable:
                found.append((depth, usable))
                waiting &= ~usable
                if not waiting and below == 0:
                    break
        return found

    def _state_holders(self, value: int) -> int:
        """A routed prompt leaves a state behind its last full block at least."""
        expected = self._expected.get(value)
        known = self._states.get(value, 0)
        return known | expected.bit if expected is not None and expected.hashes[-1] == value else known


def _add(index: dict[int, int], held: set[int], hashes: Iterable[int], bit: int) -> None:
    for value in hashes:
        index[value] = index.get(value, 0) | bit
        held.add(value)


def _discard(index: dict[int, int], held: set[int], hashes: Iterable[int], bit: int) -> None:
    for value in hashes:
        if value not in held:
            continue
        held.discard(value)
        left = index[value] & ~bit
        if left:
            index[value] = left
        else:
            del index[value]
