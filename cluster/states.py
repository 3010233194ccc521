"""The recurrent-state slots of one lane: running states, and checkpoints that later sequences can go on from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Final

_MAX_USES: Final = 8
"""Uses beyond this count no more, so that what was popular once can go in the end."""
_SPARE_ENTRIES: Final = 64
"""Void entries the queue may hold on top of one a checkpoint, before it is made anew."""


@dataclass(slots=True, kw_only=True)
class _Checkpoint:
    """The state behind the last token of one block, known by that block's hash."""

    slot: int
    gap: int
    """Tokens that would be computed again without it: from the next checkpoint before it on its prefix."""
    before: int | None
    """That checkpoint's hash."""
    behind: set[int] = field(default_factory=set)
    """Checkpoints whose `before` is this one."""
    uses: int = 1
    """Times a sequence saved it or went on from it."""
    age: int = 0
    """The pool's age when it was last used."""
    entry: int = -1
    """Number of its one valid entry in the queue of victims; grows with each use."""

    @property
    def worth(self) -> int:
        """GreedyDual-Size-Frequency (Cherkasova, 1998) for objects of one size: age + frequency * cost."""
        return self.age + min(self.uses, _MAX_USES) * self.gap


class StatePool:
    """Slots 0 .. num_slots-1, each blank, a checkpoint, or held by one owner (a sequence, a ticket, a planned save).

    Blank slots are given out first, then the checkpoint of least worth: the tokens it spares times its uses, on top
    of the worth of the last one that had to go when it was last used. When one goes, the next behind it on its prefix
    is worth the more, so that what stays of a long prefix is spread over it.

    Lent checkpoints stay until the plan that copies them is complete: a rank may begin to write a slot that a plan
    gives out (by a pull) before it carries out that plan's copies.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        """Checkpoints given up for room."""
        self._blank = list(range(num_slots - 1, -1, -1))
        self._by_hash: dict[int, _Checkpoint] = {}
        self._lent: set[int] = set()
        self._victims: list[tuple[int, int, int]] = []
        """Heap of (worth, entry, hash); an entry that is not its checkpoint's latest is void."""
        self._entries = 0
        self._age = 0
        self._changes: dict[int, bool] = {}

    @property
    def num_free(self) -> int:
        """Slots nobody holds, checkpoints among them."""
        return len(self._blank) + len(self._by_hash)

    @property
    def num_blank(self) -> int:
        """Slots with nothing in them."""
        return len(self._blank)

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that can be found."""
        return len(self._by_hash)

    @property
    def num_ready(self) -> int:
        """Slots that `take` can give out: free ones that are not lent."""
        return self.num_free - len(self._lent)

    def take(self) -> int | None:
        """A slot for one owner; None when no slot is ready."""
        if self._blank:
            return self._blank.pop()
        value = self._pop_victim()
        if value is None:
            return None
        self._age = self._by_hash[value].worth
        self.num_evicted += 1
        return self._remove(value)

    def _pop_victim(self) -> int | None:
        """The checkpoint of least worth that is not lent; its entry is gone from the queue."""
        lent = []
        found = None
        while self._victims and found is None:
            worth, entry, value = heappop(self._victims)
            checkpoint = self._by_hash.get(value)
            if checkpoint is None or checkpoint.entry != entry:
                continue
            if value in self._lent:
                lent.append((worth, entry, value))
            else:
                found = value
        for victim in lent:
            heappush(self._victims, victim)
        return found

    def give(self, slot: int) -> None:
        """Its owner lets go of a slot; what is in it is lost."""
        self._blank.append(slot)

    def keep(self, slot: int, hashes: Sequence[int], block_size: int) -> None:
        """Its owner leaves a slot as a checkpoint behind the blocks of `hashes`; one that is known keeps its slot."""
        value = hashes[-1]
        known = self._by_hash.get(value)
        if known is not None:
            self._blank.append(slot)
            self._use(value, known)
            return
        depth = self.deepest(hashes)
        before = hashes[depth - 1] if depth else None
        if before is not None:
            self._by_hash[before].behind.add(value)
        made = _Checkpoint(slot=slot, gap=(len(hashes) - depth) * block_size, before=before, age=self._age)
        self._by_hash[value] = made
        self._changes[value] = True
        self._queue(value, made)

    def deepest(self, hashes: Sequence[int]) -> int:
        """Blocks of `hashes` up to the last one with a checkpoint; 0: none has one."""
        return next((index for index in range(len(hashes), 0, -1) if hashes[index - 1] in self._by_hash), 0)

    def lend(self, value: int) -> int:
        """A sequence goes on from a checkpoint -> its slot, which stays as it is until `end_loans`."""
        checkpoint = self._by_hash[value]
        self._lent.add(value)
        self._use(value, checkpoint)
        return checkpoint.slot

    def end_loans(self) -> None:
        """The plan is complete."""
        self._lent.clear()

    def take_over(self, value: int) -> int:
        """A sequence goes on in the slot of a checkpoint that is not lent, and is none any longer -> the slot."""
        return self._remove(value)

    def is_last_ready(self, value: int) -> bool:
        """Whether `take` would have to give up this very checkpoint."""
        return self.num_ready == 1 and value in self._by_hash and value not in self._lent

    def replace(self, value: int) -> None:
        """Give up a checkpoint that a later one of the same sequence replaces, unless others have used it too."""
        checkpoint = self._by_hash.get(value)
        if checkpoint is not None and checkpoint.uses == 1:
            self._blank.append(self._remove(value))

    def forget(self, value: int) -> None:
        """Give up the checkpoint behind a block that is gone, if there is one."""
        if value in self._by_hash:
            self._blank.append(self._remove(value))
            self.num_evicted += 1

    def take_changes(self) -> dict[int, bool]:
        """Hashes whose checkpoint was kept (True) or given up (False) since the last call."""
        changes = self._changes
        self._changes = {}
        return changes

    def _use(self, value: int, checkpoint: _Checkpoint) -> None:
        checkpoint.uses += 1
        checkpoint.age = self._age
        self._queue(value, checkpoint)

    def _queue(self, value: int, checkpoint: _Checkpoint) -> None:
        """Enter it into the queue of victims with its worth of now."""
        if len(self._victims) > 2 * len(self._by_hash) + _SPARE_ENTRIES:
            self._victims = [(kept.worth, kept.entry, known) for known, kept in self._by_hash.items()]
            heapify(self._victims)
        self._entries += 1
        checkpoint.entry = self._entries
        heappush(self._victims, (checkpoint.worth, checkpoint.entry, value))

    def _remove(self, value: int) -> int:
        """Take a checkpoint out; those behind it lean on the one before it from now on -> its slot."""
        assert value not in self._lent, f"checkpoint {value:x} is given up while a plan copies it"
        gone = self._by_hash.pop(value)
        self._changes[value] = False
        before = None if gone.before is None else self._by_hash[gone.before]
        if before is not None:
            before.behind.remove(value)
            before.behind |= gone.behind
        for later in gone.behind:
            checkpoint = self._by_hash[later]
            checkpoint.before = gone.before
            checkpoint.gap += gone.gap
            self._queue(later, checkpoint)
        return gone.slot

    def check_integrity(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every slot is blank, a checkpoint or held exactly once."""
        slots = sorted([*self._blank, *(kept.slot for kept in self._by_hash.values()), *held])
        assert slots == list(range(self.num_slots)), f"slots blank, checkpoints or held: {slots}"
        assert not self._lent, f"checkpoints lent to no plan: {sorted(self._lent)}"
        queued = set(self._victims)
        for value, kept in self._by_hash.items():
            assert (kept.worth, kept.entry, value) in queued, f"checkpoint {value:x} is not in the queue of victims"
            assert kept.before is None or value in self._by_hash[kept.before].behind, f"{value:x} hangs on nothing"
            assert all(self._by_hash[later].before == value for later in kept.behind), f"{value:x} carries strangers"
