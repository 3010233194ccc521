"""The KV blocks of one lane: who holds each, and which free ones still hold a prefix worth finding."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Blocks 0 .. num_blocks-1, each blank, cached (free, but findable by hash) or held by one or more owners.

    A held block may be findable as well. Blank blocks are given out first, then cached ones, least recently
    freed first, so that a prefix survives until its room is needed.

    Args:
        num_blocks: how many there are.
        on_evict: told the hash of each prefix that had to go.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}
        self._hash_of: dict[int, int] = {}
        self._block_of: dict[int, int] = {}
        self._changes: dict[int, bool] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, cached ones among them."""
        return len(self._blank) + len(self._cached)

    def allocate(self, count: int, *, keep: int = 0) -> list[int] | None:
        """Take `count` blocks for one owner, or None when that would leave fewer than `keep` free."""
        if self.num_free < count + keep:
            return None
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
        return taken

    def _evict(self) -> int:
        """Forget the cached block that was freed longest ago."""
        block = next(iter(self._cached))
        del self._cached[block]
        value = self._hash_of.pop(block)
        del self._block_of[value]
        self._changes[value] = False
        self._on_evict(value)
        return block

    def find(self, hashes: Iterable[int]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`; they are not held yet."""
        found = []
        for value in hashes:
            block = self._block_of.get(value)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Hold found blocks for one more owner and count them as recently used."""
        for block in blocks:
            self._refs[block] += 1
            self._cached.pop(block, None)
            value = self._hash_of[block]
            self._block_of[value] = self._block_of.pop(value)

    def release(self, blocks: Sequence[int]) -> None:
        """One owner lets go of its table. The end of a prefix is forgotten before its beginning."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def register(self, block: int, value: int) -> None:
        """Make a held, filled block findable; a hash that is known already keeps its first block."""
        if value not in self._block_of:
            self._block_of[value] = block
            self._hash_of[block] = value
            self._changes[value] = True

    def take_changes(self) -> dict[int, bool]:
        """Hashes that became findable (True) or were forgotten (False) since the last call."""
        changes = self._changes
        self._changes = {}
        return changes

    def check_private(self, blocks: Iterable[int]) -> None:
        """Raise AssertionError unless these have one owner each and nobody can find them: they are written to."""
        for block in blocks:
            assert self._refs[block] == 1, f"block {block} is written to and has {self._refs[block]} owners"
            assert block not in self._hash_of, f"block {block} is written to and can be found"

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless every block is blank, cached or held as often as `tables` say."""
        holders = Counter(block for table in tables for block in table)
        blank = set(self._blank)
        assert len(blank) == len(self._blank), f"a block is blank twice: {sorted(self._blank)}"
        for block in range(self.num_blocks):
            refs = self._refs[block]
            assert refs == holders[block], f"block {block}: {refs} references, {holders[block]} owners"
            places = (block in blank) + (block in self._cached) + (refs > 0)
            assert places == 1, f"block {block} is blank, cached and held in {places} ways, want 1"
            findable = block in self._hash_of
            assert findable or block not in self._cached, f"block {block} is cached without a hash"
            assert not (findable and block in blank), f"block {block} is blank and has a hash"
        pairs = {value: block for block, value in self._hash_of.items()}
        assert pairs == self._block_of, "hash to block and block to hash disagree"
