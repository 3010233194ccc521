"""The KV blocks of a simulated member: which are held, which are free but findable, and what changes."""

from collections import OrderedDict
from collections.abc import Sequence


class SimulatedCache:
    """Blocks by prefix id, and a count of those that no other request can use (ends of prompts, outputs).

    As in the real block pool, what was freed longest ago is given up first, the end of a prefix before its beginning.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._private = 0
        self._held: dict[int, int] = {}
        self._findable: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, findable ones among them."""
        return self.num_blocks - self._private - len(self._held)

    def depth(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's first blocks are here."""
        for index, block in enumerate(blocks):
            if block not in self._findable:
                return index
        return len(blocks)

    def reserve(self, blocks: Sequence[int], private: int) -> bool:
        """Hold a prompt's blocks and `private` ones more, if there is room."""
        idle, held = self._idle, self._held
        known = sum(block in idle for block in blocks)
        new = sum(block not in held and block not in idle for block in blocks)
        if known + new + private > self.num_free:
            return False
        for block in blocks:
            held[block] = held.get(block, 0) + 1
            idle.pop(block, None)
        self._private += private
        while len(held) + self._private + len(idle) > self.num_blocks:
            evicted, _ = idle.popitem(last=False)
            self._findable.discard(evicted)
            self._removed.append(evicted)
        return True

    def fill(self, blocks: Sequence[int]) -> None:
        """Held blocks are computed: others can find them."""
        for block in blocks:
            if block not in self._findable:
                self._findable.add(block)
                self._stored.append(block)

    def release(self, blocks: Sequence[int], private: int) -> None:
        """The inverse of `reserve`."""
        self._private -= private
        for block in reversed(blocks):
            left = self._held[block] - 1
            if left:
                self._held[block] = left
            else:
                del self._held[block]
                self._idle[block] = None

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks stored and removed since the last call; removed ones go first where a block is in both."""
        stored = tuple(block for block in self._stored if block in self._findable)
        removed = tuple(block for block in self._removed if block not in self._findable)
        self._stored.clear()
        self._removed.clear()
        return stored, removed
