"""Which members of a pool hold which cached blocks, by hash: one dictionary of bit sets over all of them.

A block's hash covers everything before it, so the members that hold block i of a prompt are, but for blocks evicted
in between, among those that hold block i - 1: the sets shrink with depth, and a search for the places where they
change needs few look-ups however long the prompt. What an eviction in between hides costs a worse guess, no more.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import compress, pairwise

from router.expected import ExpectedPrefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What one member is known to hold.

    Dictionaries of numbers, unlike sets, are nothing to Python's garbage collector, which would walk over every block
    of the fleet while a request is routed.
    """

    kv: dict[int, None] = field(default_factory=dict)
    states: dict[int, None] = field(default_factory=dict)


class PrefixIndex:
    """Members are numbers from 0 on, here and in each bit set. Used by one thread; times are unix seconds.

    Args:
        max_expected: block hashes of routed prompts remembered at once; the oldest are forgotten first.
    """

    def __init__(self, *, max_expected: int) -> None:
        self._kv: dict[int, int] = {}
        self._states: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._expected = ExpectedPrefixes(max_blocks=max_expected)

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
        self._expected.leave(member)

    def expect(self, members: Sequence[int], hashes: Sequence[int], until_s: float) -> None:
        """These will soon hold these first blocks of a prompt; their own word replaces this from `until_s` on."""
        self._expected.add(members, hashes, until_s)

    def forget(self, now: float) -> None:
        """Drop expectations that were not confirmed in their time."""
        self._expected.forget(now)

    def depths(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Who holds how much of a prompt's KV.

        Returns:
            Pairs (depth, members): these members hold the first `depth` blocks and not the one behind; deepest first,
            each depth and each member at most once.
        """
        expected = self._expected.depths(hashes)
        # Where a prompt left those that were routed before it, holders are likely to change too.
        told = self._told_depths(hashes, next((depth for depth, _ in expected if depth < len(hashes)), 0))
        if not expected:
            return told
        found: list[tuple[int, int]] = []
        seen = 0
        for depth, members in sorted((*told, *expected), reverse=True):
            fresh = members & ~seen
            if fresh:
                seen |= fresh
                if found and found[-1][0] == depth:
                    fresh |= found.pop()[1]
                found.append((depth, fresh))
        return found

    def _told_depths(self, hashes: Sequence[int], guess: int) -> list[tuple[int, int]]:
        """As `depths`, by the members' own word.

        Args:
            guess: a depth at which the search looks first; 0: none.
        """
        holders = self._kv.get
        first = holders(hashes[0], 0) if hashes else 0
        if not first:
            return []
        end = len(hashes) - 1
        seen = last = holders(hashes[end], 0)
        found = [(end + 1, last)] if last else []
        # Places above `high`, whose holders are `lower`. Where holders differ, there is a change between.
        above = [(0, first)]
        if guess:
            above += [(place, holders(hashes[place], 0)) for place in (guess - 1, guess)]
        high, lower = end, last
        while above:
            low, upper = above[-1]
            while upper != lower and high - low > 1:
                middle = (low + high) // 2
                members = holders(hashes[middle], 0)
                if members == lower:
                    high = middle
                elif members == upper:
                    low = middle
                else:
                    above[-1] = (low, upper)
                    above.append((middle, members))
                    low, upper = middle, members
            fresh = upper & ~seen
            if fresh:
                found.append((high, fresh))
                seen |= fresh
            high, lower = above.pop()
        return found

    def state_depths(self, hashes: Sequence[int], depths: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `depths`, of members that can only go on where KV reaches a recurrent state.

        A routed prompt leaves a state behind its last full block at least.

        Args:
            hashes: of the prompt's blocks.
            depths: what `depths` returned for them.
        """
        states, ends = self._states, self._expected.ends(hashes)
        found: list[tuple[int, int]] = []
        waiting = 0
        for (high, joining), (low, _) in pairwise((*depths, (0, 0))):
            waiting |= joining
            for depth in _with_states(states, ends, hashes, low, high) if waiting else ():
                usable = (states.get(hashes[depth - 1], 0) | ends.get(depth, 0)) & waiting
                if usable:
                    found.append((depth, usable))
                    waiting &= ~usable
                    if not waiting:
                        break
        return found


def _with_states(
    states: Collection[int], ends: Iterable[int], hashes: Sequence[int], low: int, high: int
) -> Iterable[int]:
    """Depths over `low` up to `high` behind which somebody has, or will have, a state; deepest first."""
    # One by one from the end: a copy of a long prompt's hashes would touch them all.
    backwards = map(hashes.__getitem__, range(high - 1, low - 1, -1))
    told = compress(range(high, low, -1), map(states.__contains__, backwards))
    own = sorted((depth for depth in ends if low < depth <= high), reverse=True)
    return merge(own, told, reverse=True) if own else told


def _add(index: dict[int, int], held: dict[int, None], hashes: Iterable[int], bit: int) -> None:
    for value in hashes:
        index[value] = index.get(value, 0) | bit
        held[value] = None


def _discard(index: dict[int, int], held: dict[int, None], hashes: Iterable[int], bit: int) -> None:
    for value in hashes:
        if value not in held:
            continue
        del held[value]
        left = index[value] & ~bit
        if left:
            index[value] = left
        else:
            del index[value]
