"""One lane's part of a step while it is put together, and what is remembered of it until its commit."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.decode_run import DecodeStep, Saves, Work
from cluster.plan import PullOrder
from cluster.sequence import Sequence
from shards.batch import RowStart, StepBatch


class LaneWork(NamedTuple):
    """What a plan asks of one lane, remembered until it is committed; the rows of `decodes` come first."""

    decodes: DecodeStep | None
    works: list[Work]

    @property
    def rows_N(self) -> list[int]:  # noqa: N802 (the shape)
        """Sampled rows."""
        sampled = [work.row for work in self.works if work.samples]
        return sampled if self.decodes is None else [*self.decodes.run.rows_S, *sampled]

    @property
    def saves(self) -> list[Saves]:
        """The states that it keeps, sequence by sequence."""
        decoding = () if self.decodes is None else self.decodes.filled.values()
        return [*decoding, *(work.saves for work in self.works)]


@dataclass(slots=True, kw_only=True)
class LaneDraft:
    """A lane's part of a step while it is put together."""

    budget: int
    """Tokens that may still be added."""
    spared: int
    """Of these, those that others leave alone beside a prompt that goes first: its token comes with the step's end."""
    hurries: bool = False
    """Such a prompt is in it."""
    starts: list[RowStart] = field(default_factory=list)
    batch: StepBatch = field(default_factory=StepBatch)
    decodes: DecodeStep | None = None
    works: list[Work] = field(default_factory=list)
    pulls: list[tuple[PullOrder, Sequence]] = field(default_factory=list)
    preempted: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing is to be computed, nor does any row start."""
        return not (self.batch.rows_S or self.starts)

    def room_for(self, seq: Sequence) -> int:
        """Tokens of a sequence's prompt that may still be added."""
        return max(self.budget - self.spared, 0) if self.hurries and not seq.goes_first else self.budget

    def decode(self, step: DecodeStep) -> None:
        """Compute the next position of the sequences of a run and sample behind it; before anything else is added."""
        batch, run = self.batch, step.run
        batch.rows_S += run.rows_S
        batch.first_S += step.first_S
        batch.counts_S += run.ones_S
        batch.samples_S += run.ones_S
        batch.verifies_S += run.zeros_S
        batch.drafts_S += run.zeros_S
        self.budget -= len(run.seqs)
        self.decodes = step
        for index, saves in step.filled.items():
            self._save(run.rows_S[index], saves)

    def add(self, seq: Sequence, count: int, saves: Saves, *, verifies: int = 0, drafts: int = 0) -> None:
        """Compute the next `count` positions of a sequence, drafts among them, and sample behind the last it has."""
        samples = count - verifies == seq.remaining
        batch = self.batch
        batch.rows_S.append(seq.row)
        batch.first_S.append(seq.computed)
        batch.counts_S.append(count)
        batch.samples_S.append(int(samples))
        batch.verifies_S.append(verifies)
        batch.drafts_S.append(drafts)
        # Once its first token is sampled, though not known yet, it hurries no more.
        self.hurries |= seq.goes_first and not (seq.told or seq.pending)
        seq.computed += count - verifies
        seq.length += samples
        seq.drafts_ready = drafts
        seq.uncertain = verifies > 0
        self.budget -= count
        self.works.append(Work(seq, seq.row, seq.computed, samples, verifies, saves))
        self._save(seq.row, saves)

    def _save(self, row: int, saves: Saves) -> None:
        for end, slot in saves:
            self.batch.save_rows.append(row)
            self.batch.save_ends.append(end)
            self.batch.save_to.append(slot)

    def finish(self, *, keeps_mtp: bool) -> StepBatch:
        """The batch as the ranks get it."""
        batch = self.batch
        batch.starts = tuple(self.starts)
        batch.keeps_mtp = keeps_mtp
        if not any(batch.verifies_S):
            batch.verifies_S = []
        if not any(batch.drafts_S):
            batch.drafts_S = []
        return batch
