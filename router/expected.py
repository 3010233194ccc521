"""Prompts that were routed to members and will soon be in their caches: a radix tree over block hashes.

A block's hash covers everything before it, so two prompts agree up to the last hash that they share: how far a prompt
goes along an edge is a binary search, and a prompt of a thousand blocks is taken in with as few steps as one of ten.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


# Not frozen, as one is made for every decision.
@dataclass(slots=True, kw_only=True)
class _Entry:
    """A prompt that was routed to one member, or to one that computes it and one that goes on."""

    members: Sequence[int]
    until_s: float
    hashes: Sequence[int]


class _Node:
    """An edge of the tree: blocks `start` to `end` of the prompts that pass it."""

    __slots__ = ("children", "end", "ending", "hashes", "members", "passing", "start")

    def __init__(self, hashes: Sequence[int], start: int, end: int) -> None:
        self.hashes = hashes
        """Of the prompt that passed last, which is the last to be forgotten."""
        self.start = start
        self.end = end
        self.children: dict[int, _Node] = {}
        self.passing: dict[int, int] = {}
        """Prompts by member."""
        self.ending: dict[int, int] = {}
        """Of those, the ones whose last block is this edge's last."""
        self.members = 0
        """Those of `passing`, as a bit set."""

    def agreed(self, hashes: Sequence[int]) -> int:
        """How many blocks of a prompt are those of this edge and before it; its block `start` is known to be."""
        own, end = self.hashes, min(self.end, len(hashes))
        if own[end - 1] == hashes[end - 1]:
            return end
        low = self.start + 1
        while end - low > 1:
            middle = (low + end) // 2
            if own[middle - 1] == hashes[middle - 1]:
                low = middle
            else:
                end = middle
        return low

    def split(self, at: int) -> "_Node":
        """Make this the lower part of itself, from `at` on; returns the upper part, which is its parent now."""
        upper = _Node(self.hashes, self.start, at)
        upper.children[self.hashes[at]] = self
        upper.passing = self.passing.copy()
        upper.members = self.members
        self.start = at
        return upper


class ExpectedPrefixes:
    """Members are numbers from 0 on, here and in each bit set. Used by one thread; times are unix seconds.

    Args:
        max_blocks: block hashes remembered at once, over all prompts; `forget` drops the oldest prompts beyond them.
    """

    def __init__(self, *, max_blocks: int) -> None:
        self._root = _Node((), 0, 0)
        self._order: deque[_Entry] = deque()
        self._coming: list[_Entry] = []
        """Not in the tree yet: they get there before anybody looks, at best while a member's report is taken."""
        self._num_blocks = 0
        self._max_blocks = max_blocks

    def add(self, members: Sequence[int], hashes: Sequence[int], until_s: float) -> None:
        """These will soon hold these blocks of a prompt; never changed from now on. Times must not go back."""
        if hashes:
            self._coming.append(_Entry(members=members, until_s=until_s, hashes=hashes))

    def _take_in(self) -> None:
        for entry in self._coming:
            self._insert(entry)
        self._coming.clear()

    def _insert(self, entry: _Entry) -> None:
        members, hashes = entry.members, entry.hashes
        node, at, bits = self._root, 0, 0
        for member in members:
            bits |= 1 << member
        while at < len(hashes):
            child = node.children.get(hashes[at])
            if child is None:
                child = node.children[hashes[at]] = _Node(hashes, at, len(hashes))
            elif (agreed := child.agreed(hashes)) < child.end:
                child = node.children[hashes[at]] = child.split(agreed)
            child.hashes = hashes
            for member in members:
                child.passing[member] = child.passing.get(member, 0) + 1
            child.members |= bits
            node, at = child, child.end
        for member in members:
            node.ending[member] = node.ending.get(member, 0) + 1
        self._order.append(entry)
        self._num_blocks += len(hashes)

    def forget(self, now: float) -> None:
        """Drop prompts whose time is over, and the oldest ones for room."""
        self._take_in()
        while self._order and (self._order[0].until_s <= now or self._num_blocks > self._max_blocks):
            self._drop_oldest()

    def leave(self, member: int) -> None:
        """Drop what a member was expected to hold."""
        self._take_in()
        entries, self._order = self._order, deque()
        for entry in entries:
            if member in entry.members:
                self._drop((member,), entry.hashes)
                entry.members = [each for each in entry.members if each != member]
            if entry.members:
                self._order.append(entry)
            else:
                self._num_blocks -= len(entry.hashes)

    def _drop_oldest(self) -> None:
        entry = self._order.popleft()
        self._num_blocks -= len(entry.hashes)
        self._drop(entry.members, entry.hashes)

    def _drop(self, members: Sequence[int], hashes: Sequence[int]) -> None:
        node, at = self._root, 0
        while at < len(hashes):
            child = node.children[hashes[at]]
            for member in members:
                _take_one(child.passing, member)
                if member not in child.passing:
                    child.members ^= 1 << member
            if not child.passing:
                # Nobody passed it, nor what is below.
                del node.children[hashes[at]]
                return
            node, at = child, child.end
        for member in members:
            _take_one(node.ending, member)

    def depths(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs (depth, members): these were sent the first `depth` blocks of a prompt at least; deepest first."""
        self._take_in()
        found = [(depth, node.members) for node, depth in self._walk(hashes)]
        found.reverse()
        return found

    def ends(self, hashes: Sequence[int]) -> dict[int, int]:
        """Depth -> members that were sent a prompt which ends there and goes no other way before that."""
        self._take_in()
        found: dict[int, int] = {}
        for node, depth in self._walk(hashes):
            if depth == node.end and node.ending:
                found[depth] = sum(1 << member for member in node.ending)
        return found

    def _walk(self, hashes: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """The edges along a prompt, and how many of its first blocks it shares with each."""
        node, at = self._root, 0
        while at < len(hashes):
            child = node.children.get(hashes[at])
            if child is None:
                return
            at = child.agreed(hashes)
            yield child, at
            if at < child.end:
                return
            node = child


def _take_one(counts: dict[int, int], key: int) -> None:
    left = counts.pop(key) - 1
    if left:
        counts[key] = left
