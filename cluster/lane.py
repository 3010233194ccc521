"""One data-parallel lane: its blocks, rows and slots, who holds them, and its part of the next step."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from cluster.blocks import BlockPool
from cluster.checkpoints import checkpoint_ends, commit_saves, reserve_saves
from cluster.decode_run import DecodeRun, DecodeStep, Saves, Work
from cluster.lane_draft import LaneDraft, LaneWork
from cluster.plan import PullOrder
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Sequence
from cluster.states import StatePool
from router.request import RequestId

_ORDER = attrgetter("order")
_LOOKED_UP = 16
"""Waiting sequences whose cached prefix a report looks up: a report comes between two steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Room of a prefilled sequence that waits to be fetched."""

    request_id: RequestId
    lane: int
    blocks: tuple[int, ...]
    slot: int
    expires_unix_s: float


class Lane:
    """Room and sequences of one lane. `active` hold room (running, pulling, or ended in mid-pull), best order first.

    Room given back may be given out at once although a given-out plan still writes it: ranks carry plans out in order.
    """

    def __init__(self, index: int, config: SchedulerConfig) -> None:
        self.index = index
        self.waiting: list[Sequence] = []
        self.active: list[Sequence] = []
        self.states = StatePool(config.num_int8 or config.num_slots)
        """Kept states."""
        self.slots = StatePool(config.num_slots) if config.num_int8 else self.states
        """Where running states lie; among the kept ones, where these are exact."""
        # A state is of use only with all KV before it.
        self.blocks = BlockPool(config.num_blocks, self.states.forget)
        self.num_preemptions = 0
        """Running sequences that had to give up their room."""
        self._config = config
        self._run = DecodeRun([], [])
        """Who decoded in the last step that had no drafts."""
        self._free_rows = list(range(config.max_rows - 1, -1, -1))
        self._keeps_states = config.prefix_cache and config.num_slots > 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences here."""
        return sum(len(seq.tokens) for seq in (*self.waiting, *self.active))

    def expected_load(self, seq: Sequence) -> int:
        """Tokens held or to be held here by others, less what of `seq` is cached here."""
        return self.num_tokens - self._usable_blocks(seq, len(self._known_blocks(seq))) * self._config.block_size

    def waiting_tokens(self) -> int:
        """Tokens of prompts, or of what is computed anew, that are still to be planned; less what is cached here."""
        ahead = self.waiting[:_LOOKED_UP]
        found = (self._usable_blocks(seq, len(self._known_blocks(seq))) for seq in ahead if seq.ticket is None)
        tokens = sum(seq.uncomputed_tokens for seq in (*self.active, *self.waiting))
        return tokens - sum(found) * self._config.block_size

    def enqueue(self, seq: Sequence) -> None:
        """Let a sequence wait for room."""
        insort(self.waiting, seq, key=_ORDER)

    @property
    def is_uncertain(self) -> bool:
        """True while a given-out plan verifies drafts."""
        return any(seq.uncertain for seq in self.active)

    def plan(self, now: float, pull_ids: Iterator[int], ready: list[Sequence], drafts: int) -> LaneDraft:
        """Decide this lane's part of a step: decodes, then prompt chunks of running, then of waiting sequences.

        Args:
            ready: those of `active` that decode.
            drafts: how many to verify and to draft a decoding row, at most.
        """
        draft = LaneDraft(budget=self._config.max_step_tokens, spared=self._config.max_step_tokens // 2)
        # None of these begins to decode by what follows, but any may be preempted.
        longer = [seq for seq in self.active if seq.remaining > 1] if len(ready) < len(self.active) else []
        ready = self._with_room(ready, draft)
        if drafts:
            self._speculate(ready, draft, drafts)
        elif ready:
            self._decode(ready, draft)
        for seq in [seq for seq in longer if seq.phase == "running"]:
            if self.waiting and not draft.preempted:
                self._admit(draft, now, pull_ids, before=seq)
            self._add_chunk(seq, draft)
        # Whoever was preempted now is back in the next step at the earliest, when all its earlier work is committed.
        if not draft.preempted:
            self._admit(draft, now, pull_ids)
        self.states.end_loans()
        return draft

    def _add_chunk(self, seq: Sequence, draft: LaneDraft) -> None:
        count = min(seq.remaining, self._config.chunk_tokens, draft.room_for(seq))
        if count:
            self._compute(seq, count, draft)

    def _with_room(self, ready: list[Sequence], draft: LaneDraft) -> list[Sequence]:
        """Give a block to those that have none for their next position -> those that have one."""
        size = self._config.block_size
        short = [seq for seq in ready if seq.computed >= len(seq.blocks) * size]
        waits = [seq for seq in short if seq.phase == "running" and not self._grow(seq, draft)]
        if waits or draft.preempted:
            return [seq for seq in ready if seq.phase == "running" and seq not in waits]
        return ready

    def _decode(self, ready: list[Sequence], draft: LaneDraft) -> None:
        """Add the next position of each."""
        rows, size = [seq.row for seq in ready], self._config.block_size
        if not self._run.is_of(ready, rows):
            self._run = DecodeRun(ready, rows)
        first_S = self._run.advance()
        filled: dict[int, Saves] = {i: () for i, first in enumerate(first_S) if not (first + 1) % size}
        if self._keeps_states:
            marked = {*filled, *(i for i, seq in enumerate(ready) if seq.checkpoint_ends)}
            filled = {i: reserve_saves(ready[i], first_S[i] + 1, self.states, size) for i in sorted(marked)}
        draft.decode(DecodeStep(run=self._run, first_S=first_S, filled=filled))

    def _speculate(self, ready: list[Sequence], draft: LaneDraft, drafts: int) -> None:
        """Add the next position of each with up to so many drafts behind it, and draft as many anew."""
        spare = draft.budget - len(ready)
        for seq in ready:
            verifies, ahead = self._fit_drafts(seq, draft, drafts, spare)
            spare -= verifies
            self._compute(seq, 1 + verifies, draft, verifies=verifies, drafts=ahead)

    def _fit_drafts(self, seq: Sequence, draft: LaneDraft, drafts: int, spare: int) -> tuple[int, int]:
        """How many of a decoding sequence's drafts to verify, and how many to draft behind it.

        Not beyond its last token, nor beyond blocks that are free. Where states are kept not beyond the next block's
        end either: the state there could not be kept.
        """
        size, left = self._config.block_size, seq.tokens_left
        verifies = min(seq.drafts_ready, drafts, left - 1, spare)
        if self._keeps_states:
            verifies = min(verifies, size - 1 - seq.computed % size)
        positions = min(1 + verifies + max(drafts - 1, 0), self._config.max_model_len - seq.computed)
        room = self._room_without_preempting(seq, draft, positions)
        verifies = min(verifies, room - 1)
        end = seq.length + verifies
        return verifies, max(0, min(drafts, left - 2, room - verifies, self._config.max_model_len - end))

    def _room_without_preempting(self, seq: Sequence, draft: LaneDraft, positions: int) -> int:
        """Grow a sequence's blocks for its next `positions`, if they are free and nobody is short then -> its room."""
        size = self._config.block_size
        need = self._config.blocks_for(seq.computed + positions) - len(seq.blocks)
        grown = self.blocks.allocate(need, keep=len(self.active)) if need > 0 else None
        if grown is not None:
            seq.blocks += grown
            draft.batch.grown_rows.extend([seq.row] * len(grown))
            draft.batch.grown_blocks.extend(grown)
        return len(seq.blocks) * size - seq.computed

    def _compute(self, seq: Sequence, count: int, draft: LaneDraft, *, verifies: int = 0, drafts: int = 0) -> None:
        """Add a sequence's next positions."""
        end, size = seq.computed + count, self._config.block_size
        saves = reserve_saves(seq, end, self.states, size) if self._keeps_states else ()
        draft.add(seq, count, saves, verifies=verifies, drafts=drafts)

    def _grow(self, seq: Sequence, draft: LaneDraft) -> bool:
        """Add a block for the next position, by preempting later sequences if need be; False: wait a step."""
        while (grown := self.blocks.allocate(1)) is None:
            victim = self._victim(seq)
            if victim is None:
                return False
            self.requeue(victim)
            self.num_preemptions += 1
            draft.preempted = True
        seq.blocks += grown
        draft.batch.grown_rows.append(seq.row)
        draft.batch.grown_blocks.extend(grown)
        return True

    def _victim(self, seq: Sequence) -> Sequence | None:
        """The last sequence behind `seq` that can give up its room.

        Not one that a rank still writes by pulling, or that others read, nor one that will end by itself when its plan
        is committed.
        """
        behind = [other for other in self.active[self.active.index(seq) + 1 :] if other.phase == "running"]
        return next((other for other in reversed(behind) if not (other.all_sampled or other.offer)), None)

    def _admit(self, draft: LaneDraft, now: float, pull_ids: Iterator[int], before: Sequence | None = None) -> None:
        """Give room to waiting sequences in order (those before another one), up to the first that must wait longer."""
        while (seq := next((one for one in self.waiting if not one.awaits_pull), None)) and draft.room_for(seq):
            if seq.ticket is not None and not seq.ticket.lasts(now):
                seq.ticket = None
            if (before and seq.order > before.order) or seq.pending or not self._reserve(seq, draft):
                break
            self.waiting.remove(seq)
            insort(self.active, seq, key=_ORDER)
            draft.starts.append(seq.start(self._config.block_size))
            if seq.ticket is None:
                seq.phase = "running"
                self._add_chunk(seq, draft)
            else:
                seq.phase = "pulling"
                draft.pulls.append((self._pull_order(seq, next(pull_ids)), seq))

    def _reserve(self, seq: Sequence, draft: LaneDraft) -> bool:
        """Take a row, a slot and blocks for all tokens, leaving each active sequence a block to grow.

        With recurrent state, KV may be known farther than any state. Then what lies between is computed once more, for
        the state alone: others may read the known blocks, so that ranks write nothing there.
        """
        if not self._free_rows or (self._config.num_slots and not self.slots.num_ready):
            return False
        known = self._known_blocks(seq)
        self.blocks.share(known)
        need = self._config.blocks_for(len(seq.tokens)) - len(known)
        fresh = self.blocks.allocate(need, keep=len(self.active))
        if fresh is None:
            self.blocks.release(known)
            return False
        usable = self._usable_blocks(seq, len(known))
        slot = self._slot(seq, usable, draft)
        cached = usable * self._config.block_size
        seq.admit(known + fresh, registered=len(known), cached=cached, row=self._free_rows.pop(), slot=slot)
        if self._keeps_states and seq.ticket is None:
            shared, length = len(known) * self._config.block_size, len(seq.tokens)
            # Where rows have their states in the same slots, those that may still come will want theirs.
            blank = self.states.num_blank - (len(self._free_rows) if self.states is self.slots else 0)
            seq.checkpoint_ends = checkpoint_ends(self._config, first=cached, shared=shared, length=length, blank=blank)
        return True

    def _slot(self, seq: Sequence, usable: int, draft: LaneDraft) -> int:
        """A recurrent-state slot that holds the state behind `usable` blocks when the step begins; -1: none needed."""
        if not self._config.num_slots:
            return -1
        if usable and seq.ticket is None:
            value = seq.hashes(usable, self._config.block_size)[-1]
            if self.slots.is_last_ready(value):
                return self.slots.take_over(value)
            draft.batch.restore_from.append(self.states.lend(value))
            slot = self.slots.take()
            assert slot is not None, f"{seq.request.id} got no slot although one was ready"
            draft.batch.restore_to.append(slot)
            return slot
        slot = self.slots.take()
        assert slot is not None, f"{seq.request.id} got no slot although one was ready"
        return slot

    def _known_blocks(self, seq: Sequence) -> list[int]:
        """Blocks found by hash. They never cover the last token: computing it yields the next one.

        Nor what lies behind the recurrent state that a pull brings: the state must advance over it.
        """
        if not self._config.prefix_cache or seq.wants_prompt_logprobs:
            return []
        size, last = self._config.block_size, len(seq.tokens) - 1
        if self._config.num_slots and seq.ticket is not None:
            last = min(last, seq.ticket.num_tokens)
        return self.blocks.find(seq.hashes(last // size, size))

    def _usable_blocks(self, seq: Sequence, known: int) -> int:
        """How many of the `known` first blocks need no step: with recurrent state, up to one whose state is kept.

        A pull brings the state along.
        """
        if not self._config.num_slots or seq.ticket is not None:
            return known
        return self.states.deepest(seq.hashes(known, self._config.block_size))

    def _pull_order(self, seq: Sequence, pull_id: int) -> PullOrder:
        ticket = seq.ticket
        assert ticket is not None, f"{seq.request.id} pulls without a ticket"
        held, end = seq.registered, self._config.blocks_for(ticket.num_tokens)
        return PullOrder(
            pull_id=pull_id,
            ticket=ticket,
            lane=self.index,
            first=held * self._config.block_size,
            dst_blocks=tuple(seq.blocks[held:end]),
            dst_slot=seq.slot,
        )

    def pulled(self, seq: Sequence) -> None:
        """A pull ended well: go on behind what it brought."""
        assert seq.ticket is not None, f"{seq.request.id} pulled without a ticket"
        seq.phase = "running"
        seq.computed = max(seq.computed, seq.ticket.num_tokens)
        seq.ticket = None
        self._settle_to(seq, seq.computed)

    def settle(self, work: Work, accepted: int = 0) -> None:
        """A plan is committed: what it computed, up to `accepted` drafts, may be found by others.

        If the sequence still has that room. Tokens behind `work.end` must be known by now.
        """
        seq = work.seq
        if seq.phase == "running":
            seq.settled = work.end + accepted
            if seq.settled // self._config.block_size > seq.registered:
                self._settle_to(seq, seq.settled)

    def settle_state(self, work: Work, *, sound: bool) -> None:
        """As `commit_saves`; after `settle`."""
        if work.saves:
            commit_saves(work, self.states, self._config.block_size, sound=sound)

    def _settle_to(self, seq: Sequence, end: int) -> None:
        seq.settled = end
        full = end // self._config.block_size
        if self._config.prefix_cache and full > seq.registered:
            hashes = seq.hashes(full, self._config.block_size)
            for i in range(seq.registered, full):
                self.blocks.register(seq.blocks[i], hashes[i])
            seq.registered = full

    def requeue(self, seq: Sequence) -> None:
        """Take all room from an active sequence; it waits, and computes its tokens anew."""
        self.leave(seq)
        seq.phase = "waiting"
        seq.ticket = None
        seq.computed = seq.settled = seq.registered = 0
        self.enqueue(seq)

    def leave(self, seq: Sequence) -> None:
        """Free all room of an active sequence."""
        self.active.remove(seq)
        self.blocks.release(seq.blocks)
        self._free_rows.append(seq.row)
        self._give_slot(seq.slot)
        seq.vacate()

    def end(self, seq: Sequence) -> None:
        """Let a sequence go. Ranks that pull for it still write its room: that is freed when they are done."""
        if seq.phase == "waiting":
            self.waiting.remove(seq)
        elif seq.phase == "running":
            self.leave(seq)
        seq.phase = "ended"

    def pin(self, seq: Sequence, expires_unix_s: float, *, state: bool = True) -> Pinned:
        """End a prefilled sequence but keep its blocks and its slot, or without `state` the blocks alone."""
        self.active.remove(seq)
        self._free_rows.append(seq.row)
        seq.phase = "ended"
        if not state:
            self._give_slot(seq.slot)
            seq.slot = -1
        return Pinned(
            request_id=seq.request.id,
            lane=self.index,
            blocks=tuple(seq.blocks),
            slot=seq.slot,
            expires_unix_s=expires_unix_s,
        )

    def unpin(self, pinned: Pinned) -> None:
        """Free what `pin` kept."""
        self.blocks.release(pinned.blocks)
        self._give_slot(pinned.slot)

    def _give_slot(self, slot: int) -> None:
        """Give a recurrent-state slot back; -1 is none."""
        if slot >= 0:
            self.slots.give(slot)

    def describe(self) -> str:
        """What is free here, and who holds or waits for the rest."""
        return (
            f"lane {self.index}: {len(self.active)} active, {len(self.waiting)} waiting, "
            f"{self.blocks.num_free} blocks, {len(self._free_rows)} rows and {self.slots.num_free} slots free"
        )

    def check_integrity(self, pinned: list[Pinned], uncommitted: list[LaneWork], early: list[list[int]]) -> None:
        """Raise AssertionError unless blocks, rows and slots are each free or owned as often as they should be."""
        held = [*(seq.blocks for seq in self.active), *(pin.blocks for pin in pinned), *early]
        self.blocks.check_integrity(held)
        rows = sorted([*self._free_rows, *(seq.row for seq in self.active)])
        assert rows == list(range(self._config.max_rows)), f"lane {self.index}: rows free or held: {rows}"
        owners = (self.active, pinned)
        slots = [owner.slot for group in owners for owner in group if owner.slot >= 0]
        saved = [slot for work in uncommitted for saves in work.saves for _, slot in saves]
        if self.slots is self.states:
            self.states.check_integrity([*slots, *saved])
        else:
            self.slots.check_integrity(slots)
            self.states.check_integrity(saved)
        for seq in self.active:
            self.blocks.check_private(seq.blocks[max(seq.registered, seq.settled // self._config.block_size) :])
        for seq in self.waiting:
            assert seq.phase == "waiting", f"{seq.request.id} is {seq.phase} but in the waiting list"
            assert not seq.blocks, f"{seq.request.id} waits but holds blocks {seq.blocks}"
