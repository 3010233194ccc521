"""One lane's part of a step while it is put together, and what is remembered of it until its commit."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cluster.plan import PullOrder
from cluster.sequence import Sequence
from shards.batch import RowStart, StepBatch


class Work(NamedTuple):
    """What a plan asks of one sequence, remembered until the plan is committed.

    A tuple: one is made a row and step, and a frozen dataclass takes three times as long.
    """

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
        self, seq: Sequence, count: int, saves: tuple[tuple[int, int], ...], *, verifies: int = 0, drafts: int = 0
    ) -> None:
        """Compute the next `count` positions of a sequence, drafts among them, and sample behind the last it has."""
        samples = count - verifies == seq.remaining
        batch = self.batch
        batch.rows_S.append(seq.row)
        batch.first_S.append(seq.computed)
        batch.counts_S.append(count)
        batch.samples_S.append(int(samples))
        batch.verifies_S.append(verifies)
        batch.drafts_S.append(drafts)
        seq.computed += count - verifies
        seq.pending += samples
        seq.drafts_ready = drafts
        seq.uncertain = verifies > 0
        self.budget -= count
        self.works.append(Work(seq, seq.row, seq.computed, samples, verifies, saves))
        for end, slot in saves:
            batch.save_rows.append(seq.row)
            batch.save_ends.append(end)
            batch.save_to.append(slot)

    def finish(self, *, keeps_mtp: bool) -> StepBatch:
        """The batch as the ranks get it."""
        verifies, drafts = self.batch.verifies_S, self.batch.drafts_S
        return replace(
            self.batch,
            starts=tuple(self.starts),
            keeps_mtp=keeps_mtp,
            verifies_S=verifies if any(verifies) else [],
            drafts_S=drafts if any(drafts) else [],
        )
