"""What the members of one block size have cached, by their own word and by what was routed to them."""

from collections.abc import Sequence

from router.load import CacheEvents, MemberLoad
from router.prefix_index import PrefixIndex
from router.prompt import Prompt


class Caches:
    """A member is a number here, from 0 on, and keeps it in whatever role. Used by one thread; times are unix seconds.

    Args:
        block_size: of all members.
        max_expected: see PrefixIndex.
    """

    def __init__(self, block_size: int, *, max_expected: int) -> None:
        self._block_size = block_size
        self._index = PrefixIndex(max_expected=max_expected)
        self._free: list[int] = []
        self._count = 0
        self._recurrent = False

    def add(self, load: MemberLoad) -> int:
        """Take a member in, of whose cache nothing is known; returns its number."""
        self._recurrent = load.total_state_slots > 0
        if self._free:
            return self._free.pop()
        self._count += 1
        return self._count - 1

    def leave(self, number: int) -> None:
        """A member left."""
        self._index.clear(number)
        self._free.append(number)

    def take_events(self, number: int, events: CacheEvents) -> None:
        """What happened in a member's prefix cache."""
        if events.cleared:
            self._index.clear(number)
        self._index.remove(number, events.removed, events.removed_states)
        self._index.store(number, events.stored, events.stored_states)

    def expect(self, numbers: Sequence[int], prompt: Prompt, until_s: float) -> None:
        """The prompt goes to these members, and will be in their caches."""
        self._index.expect(numbers, prompt.hashes(self._block_size), until_s)

    def forget(self, now: float) -> None:
        """Drop what was expected and not confirmed in its time."""
        self._index.forget(now)

    def depths(self, prompt: Prompt, now: float) -> list[tuple[int, int]]:
        """Pairs (blocks, members): these can go on behind so many first blocks of the prompt; deepest first."""
        hashes = prompt.hashes(self._block_size)
        self.forget(now)
        depths = self._index.depths(hashes)
        return self._index.state_depths(hashes, depths) if self._recurrent and depths else depths
