"""What a scheduler's policy of drafts is told of its plans: when steps began and ended, and which drafts were right."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cluster.decode_run import Work
from cluster.lane_draft import LaneDraft
from cluster.plan import StepOutput, StepPlan
from cluster.scheduler_config import SchedulerConfig
from cluster.speculation import DraftPolicy

_MOST_ROWS_SHORT: Final = 0.25
"""A step counts as one of d drafts when its rows lack at most this part of them: a row near the end of a block, of its
room or of its output drafts less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What a step with rows is measured as."""

    began: float
    rows: int
    """Decoding rows of the fullest lane; 0: the step does other work too, and is not measured."""
    rows_of_all: int
    drafts: int | None
    kept: bool


_OTHER_WORK: Final = _Planned(rows=0, began=0.0, rows_of_all=0, drafts=None, kept=False)


class Drafting:
    """One scheduler's drafts. Times are those given to the scheduler.

    Args:
        policy: what schedulers of the same ranks learnt before; None: nothing is known.
    """

    def __init__(self, config: SchedulerConfig, policy: DraftPolicy | None = None) -> None:
        self._policy = policy or DraftPolicy(config.draft_tokens, adaptive=config.draft_adaptive)
        self._planned: deque[_Planned] = deque()
        self._ended: float | None = None
        """When the last step ended; None when nothing was to be done then."""
        self.num_drafted = 0
        self.num_accepted = 0

    def choose(self, decoding: list[int]) -> int:
        """Drafts a row of the next step, given the decoding sequences of every lane."""
        rows = max(decoding)
        return self._policy.choose(rows) if rows and self._policy.most else 0

    def keeps_mtp(self, lanes: Iterable[LaneDraft]) -> bool:
        """Whether the step just chosen for keeps what later drafts need: not in a nap, nor where that is measured."""
        policy = self._policy
        return policy.keeps or (policy.keeps_prompts and not all(lane.batch.only_decodes for lane in lanes))

    def planned(self, plan: StepPlan, drafts: int, now: float) -> None:
        """A plan with rows is given out; `drafts` were chosen for it."""
        if not self._policy.most:
            return
        if self._policy.asleep or not all(lane.only_decodes for lane in plan.lanes):
            self._planned.append(_OTHER_WORK)
            return
        rows = [len(lane.rows_S) for lane in plan.lanes]
        wanted, kept = drafts * sum(rows), plan.lanes[0].keeps_mtp
        done = (sum(sum(lane.verifies_S) for lane in plan.lanes), sum(sum(lane.drafts_S) for lane in plan.lanes))
        alike = wanted * (1 - _MOST_ROWS_SHORT) <= min(done) and max(done) <= wanted
        measured_as = drafts if alike else None
        self._planned.append(_Planned(began=now, rows=max(rows), rows_of_all=sum(rows), drafts=measured_as, kept=kept))

    def verified(self, work: Work, accepted: int) -> None:
        """A row's drafts were verified."""
        self.num_drafted += work.verifies
        self.num_accepted += accepted
        self._policy.verified(work.verifies, accepted)

    def committed(self, output: StepOutput, now: float, *, busy: bool) -> None:
        """The oldest plan is done. `busy`: there is more to do, so that the next step's time begins now."""
        if not self._planned:
            return
        planned = self._planned.popleft()
        if planned.rows:
            began = planned.began if self._ended is None else self._ended
            tokens = sum(len(lane.tokens_N) for lane in output.lanes)
            self._policy.measured(
                rows=planned.rows,
                drafts=planned.drafts,
                kept=planned.kept,
                tokens_a_row=tokens / planned.rows_of_all,
                seconds=now - began,
            )
        self._ended = now if busy else None
