"""One lane's part of a step while it is put together, and what is remembered of it until its commit."""

from dataclasses import dataclass, field, replace

from cluster.plan import PullOrder
from cluster.sequence import Sequence
from shards.batch import RowStart, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a plan asks of one sequence, remembered until the plan is committed."""

    seq: Sequence
    row: int
    end: int
    """First position behind the computed ones; behind those before the drafts where it verifies some."""
    samples: bool
    verifies: int = 0
    """Drafts among what it computes, behind `end`."""
    saves: tuple[tuple[int, int], ...] = ()
    """(position, slot): the slot gets the state behind that many positions, all drafts among them."""


@dataclass(slots=True, kw_only=True)
class LaneDraft:
    """A lane's part of a step while it is put together."""

    budget: int
    """Tokens that may still be added."""
    starts: list[RowStart] = field(default_factory=list)
    batch: StepBatch = field(default_factory=StepBatch)
    works: list[Work] = field(default_factory=list)
    pulls: list[tuple[PullOrder, Sequence]] = field(default_factory=list)
    preempted: bool = False

    def add(
        self, seq: Sequence, count: int, saves: list[tuple[int, int]], *, verifies: int = 0, drafts: int = 0
    ) -> None:
        """Compute the next `count` positions of a sequence, drafts among them, and sample behind the last it has."""
        samples = count - verifies == seq.remaining
        self.batch.rows_S.append(seq.row)
        self.batch.first_S.append(seq.computed)
        self.batch.counts_S.append(count)
        self.batch.samples_S.append(int(samples))
        self.batch.verifies_S.append(verifies)
        self.batch.drafts_S.append(drafts)
        seq.computed += count - verifies
        seq.pending += samples
        seq.drafts_ready = drafts
        seq.uncertain = verifies > 0
        self.budget -= count
        work = Work(seq=seq, row=seq.row, end=seq.computed, samples=samples, verifies=verifies, saves=tuple(saves))
        self.works.append(work)
        for end, slot in saves:
            self.batch.save_rows.append(seq.row)
            self.batch.save_ends.append(end)
            self.batch.save_to.append(slot)

    def finish(self, *, keeps_mtp: bool) -> StepBatch:
        """The batch as the ranks get it."""
        batch = replace(self.batch, starts=tuple(self.starts), keeps_mtp=keeps_mtp)
        if not any(batch.verifies_S):
            batch = replace(batch, verifies_S=[])
        return batch if any(batch.drafts_S) else replace(batch, drafts_S=[])
