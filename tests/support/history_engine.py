"""A member of random histories: a real engine on ranks of any kind, driven turn by turn in one thread."""

from collections import deque
from collections.abc import Callable
from typing import Final

from cluster.engine import Engine, EngineEvent, EngineOutlets
from cluster.plan import HandoffReady, KvLayout, KvTicket, PullDone, PullOrder, StepOutput, StepPlan
from cluster.scheduler_config import SchedulerConfig
from router.errors import MoefleetError
from router.request import MemberId
from tests.support.history_members import MemberRanks

_NEVER_S: Final = 1e9
"""Histories' clocks leap: no engine counts as hung."""


class _Driven:
    """`Ranks` that carry a plan out when it is launched; pulls are carried out by whoever drives the engine."""

    def __init__(self, ranks: MemberRanks) -> None:
        self.orders: list[PullOrder] = []
        """Pulls that are to be carried out."""
        self.done: list[PullDone] = []
        """And those whose end the engine has not seen."""
        self._ranks = ranks
        self._outputs: deque[StepOutput] = deque()

    def launch(self, plan: StepPlan) -> None:
        self.orders += plan.pulls
        output = StepOutput(step=plan.step, lanes=self._ranks.step(plan.lanes))
        if plan.has_rows:
            self._outputs.append(output)

    def result(self) -> StepOutput:
        return self._outputs.popleft()

    def poll_pulls(self) -> list[PullDone]:
        done = self.done.copy()
        self.done.clear()
        return done

    def wake_on(self, wake: Callable[[], None]) -> None:
        del wake

    def close(self) -> None:
        pass


class HistoryMember:
    """An engine that is not started, its clock, and what its pulls read and write.

    Args:
        tp: of its ranks.
        clock: seconds of the history.
        on_events: gets what the engine gives out.
    """

    def __init__(
        self,
        name: str,
        ranks: MemberRanks,
        config: SchedulerConfig,
        *,
        tp: int,
        clock: Callable[[], float],
        on_events: Callable[["HistoryMember", list[EngineEvent]], None],
    ) -> None:
        self.name = name
        self.config = config
        self._room, self._tp = ranks, tp
        self._driven = _Driven(ranks)
        outlets = EngineOutlets(
            on_events=lambda events: on_events(self, events), make_ticket=self._ticket, on_failure=_raise
        )
        self.engine = Engine(
            config, self._driven, outlets, member_id=MemberId(name), step_timeout_s=_NEVER_S, clock=clock
        )

    @property
    def orders(self) -> list[PullOrder]:
        """Pulls that are to be carried out."""
        return self._driven.orders

    def turn(self) -> bool:
        """One turn of the engine, and a look at every block, slot and row -> whether there was anything to do."""
        did = self.engine.turn()
        self.engine.check_integrity()
        return did

    def pull(self, index: int, source: "HistoryMember", *, torn: bool, releases: bool) -> None:
        """End one of the pulls, in any order; the engine sees it in its next turn.

        Args:
            torn: it fails, and what it left is worth nothing.
            releases: or else the source keeps what was read until its lease is over.
        """
        order = self.orders.pop(index)
        ticket, size = order.ticket, self.config.block_size
        blocks = list(ticket.blocks[order.first // size : -(-ticket.num_tokens // size)])
        content = source._room.read(lane_of(ticket), blocks, ticket.state_slot)
        self._room.write(order.lane, list(order.dst_blocks[: len(blocks)]), order.dst_slot, content)
        if releases:
            source.engine.release_ticket(id_of(ticket))
        if torn:
            self._room.fill(order.lane, order.dst_blocks, order.dst_slot)
        self._driven.done.append(PullDone(pull_id=order.pull_id, error="torn" if torn else ""))

    def _ticket(self, ready: HandoffReady) -> KvTicket:
        config = self.config
        layout = KvLayout(
            fingerprint="",
            tp=self._tp,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            num_slots=config.num_slots,
            dtype="float32",
        )
        return KvTicket(
            id=f"{ready.lane}:{ready.ticket_id}",
            member_id=self.name,
            layout=layout,
            ranks=(),
            blocks=ready.blocks,
            state_slot=ready.state_slot,
            num_tokens=ready.num_tokens,
            expires_unix_s=ready.expires_unix_s,
            partial=ready.partial,
            step=ready.step,
        )


def lane_of(ticket: KvTicket) -> int:
    """The lane of the source that holds the sequence."""
    return int(ticket.id.split(":", 1)[0])


def id_of(ticket: KvTicket) -> str:
    """What the source's scheduler calls it."""
    return ticket.id.split(":", 1)[1]


def _raise(error: MoefleetError) -> None:
    raise error
