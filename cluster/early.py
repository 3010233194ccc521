"""Pulls of a prompt's finished blocks while the rest of it is still computed elsewhere. Pure.

What they bring become cached blocks that nobody holds: the hand-off finds them like any other known prefix, and takes
what is missing. So nothing is owed to a request that does not come, and room that is short is simply taken back.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cluster.lane import Lane
from cluster.plan import KvTicket, PullDone, PullOrder
from router.request import RequestId

MOST_BEHIND_STEPS: Final = 2
"""Pulls under way at once of what a step still writes: each has a thread of every rank wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offered:
    """What is computed of a prompt elsewhere."""

    hashes: Sequence[int]
    """Of all blocks that the ticket covers."""
    ticket: KvTicket


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pull:
    """Room that ranks are writing."""

    request_id: RequestId
    lane: Lane
    blocks: list[int]
    hashes: Sequence[int]
    expires_unix_s: float
    behind_step: bool
    """The step that writes it may fail yet: it counts when the request is here with its ticket."""


class EarlyPulls:
    """State with one writer, the scheduler. One pull a request at a time.

    An entry of a request that is expected holds no room: gateways, which bound their requests, end each.
    """

    def __init__(self, lanes: Sequence[Lane], *, block_size: int) -> None:
        self._lanes = lanes
        self._block_size = block_size
        self._expected: dict[RequestId, Lane] = {}
        self._offered: dict[RequestId, _Offered] = {}
        """Newest word of those expected, until it is looked at."""
        self._failed: set[RequestId] = set()
        """Of those expected: a pull has failed, and the next would; the hand-off says why."""
        self._pulls: dict[int, _Pull] = {}
        self._held: dict[RequestId, _Pull] = {}
        """Of those expected: pulled, and not known to count."""
        self._void: set[int] = set()
        """Pulls that bring nothing to be found: their source may have been given to others meanwhile."""

    @property
    def is_idle(self) -> bool:
        """True when no pull is under way."""
        return not self._pulls

    def leases(self) -> list[float]:
        """Until when each pull under way may last, unix seconds."""
        return [pull.expires_unix_s for pull in self._pulls.values()]

    def blocks(self, lane: Lane) -> list[list[int]]:
        """What pulls are writing in a lane, or have written and nobody may find yet."""
        return [pull.blocks for pull in (*self._pulls.values(), *self._held.values()) if pull.lane is lane]

    def expect(self, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket) -> None:
        """More of a prompt can be read: `ticket` names all of it so far, `hashes` its full blocks."""
        if request_id not in self._expected:
            coming = Counter(lane.index for lane in self._expected.values())
            self._expected[request_id] = min(
                self._lanes, key=lambda lane: (lane.num_tokens + coming[lane.index] * ticket.num_tokens, lane.index)
            )
        if request_id not in self._failed:
            self._offered[request_id] = _Offered(hashes=hashes, ticket=ticket)

    def orders(self, now: float, pull_ids: Iterator[int]) -> list[PullOrder]:
        """Begin to pull what is offered and not known here, where there is room for it."""
        busy = {pull.request_id for pull in self._pulls.values()}
        orders: list[PullOrder] = []
        for request_id in [each for each in self._offered if each not in busy]:
            behind_steps = sum(pull.behind_step for pull in self._pulls.values())
            if self._offered[request_id].ticket.step >= 0 and behind_steps >= MOST_BEHIND_STEPS:
                continue
            offered = self._offered.pop(request_id)
            order = self._order(request_id, offered, pull_ids) if offered.ticket.lasts(now) else None
            if order is not None:
                orders.append(order)
        return orders

    def _order(self, request_id: RequestId, offered: _Offered, pull_ids: Iterator[int]) -> PullOrder | None:
        lane, hashes, ticket = self._expected[request_id], offered.hashes, offered.ticket
        found = lane.blocks.find(hashes)
        known = len(found)
        # Or room might be made of them.
        lane.blocks.share(found)
        blocks = lane.blocks.allocate(len(hashes) - known, keep=len(lane.active)) if known < len(hashes) else None
        lane.blocks.release(found)
        if blocks is None:
            return None
        pull_id = next(pull_ids)
        self._pulls[pull_id] = _Pull(
            request_id=request_id,
            lane=lane,
            blocks=blocks,
            hashes=hashes[known:],
            expires_unix_s=ticket.expires_unix_s,
            behind_step=ticket.step >= 0,
        )
        return PullOrder(
            pull_id=pull_id,
            ticket=replace(ticket, num_tokens=len(hashes) * self._block_size, partial=False),
            lane=lane.index,
            first=known * self._block_size,
            dst_blocks=tuple(blocks),
            dst_slot=-1,
        )

    def pull_done(self, done: PullDone, now: float) -> RequestId | None:
        """Let others find what a pull has brought -> whose it was; None: it is none of these."""
        pull = self._pulls.pop(done.pull_id, None)
        if pull is None:
            return None
        if done.error and pull.request_id in self._expected:
            self._failed.add(pull.request_id)
            self._offered.pop(pull.request_id, None)
        void = done.pull_id in self._void
        self._void.discard(done.pull_id)
        sound = now < pull.expires_unix_s and not (done.error or void)
        if sound and pull.behind_step and pull.request_id in self._expected:
            self._held[pull.request_id] = pull
        else:
            _let_go(pull, sound=sound)
        return pull.request_id

    def claim(self, request_id: RequestId) -> Lane | None:
        """The request is here: its lane, if it was expected. A pull under way goes on, and what it brings counts."""
        held = self._held.pop(request_id, None)
        if held is not None:
            _let_go(held, sound=True)
        self._offered.pop(request_id, None)
        self._failed.discard(request_id)
        return self._expected.pop(request_id, None)

    def is_pulling(self, request_id: RequestId) -> bool:
        """Whether a pull for this request is under way."""
        return any(pull.request_id == request_id for pull in self._pulls.values())

    def forget(self, request_id: RequestId) -> bool:
        """The request does not come, or its source is not kept any more -> whether it was expected."""
        self._void.update(key for key, pull in self._pulls.items() if pull.request_id == request_id)
        held = self._held.pop(request_id, None)
        if held is not None:
            _let_go(held, sound=False)
        return self.claim(request_id) is not None


def _let_go(pull: _Pull, *, sound: bool) -> None:
    """Free a pull's room, or let others find what is in it."""
    if sound:
        for block, value in zip(pull.blocks, pull.hashes, strict=True):
            pull.lane.blocks.register(block, value)
    pull.lane.blocks.release(pull.blocks)
