"""The prefill side of a hand-off: room that others may read, until they have or the lease is over. Pure."""

from collections.abc import Iterable
from collections.abc import Sequence as Several
from itertools import count

from cluster.lane import Lane, Pinned
from cluster.lane_draft import LaneDraft
from cluster.plan import HandoffReady
from cluster.scheduler_config import SchedulerConfig
from cluster.sequence import Offer, Sequence
from router.request import RequestId


class Leases:
    """State with one writer, the scheduler.

    A long prompt is offered while it is computed, under the id that its ticket will have. The sequence then keeps its
    room by itself; when it ends early, the room stays for as long as the offer does.
    """

    def __init__(self, config: SchedulerConfig, lanes: Several[Lane]) -> None:
        self._config = config
        self._lanes = lanes
        self._pinned: dict[str, Pinned] = {}
        self._ticket_ids = count()

    def __len__(self) -> int:
        """Tickets whose room is kept."""
        return len(self._pinned)

    def num_waiting(self, now: float) -> int:
        """Of these, the ones that may still be fetched."""
        return sum(pinned.expires_unix_s > now for pinned in self._pinned.values())

    def pinned(self, lane: Lane) -> list[Pinned]:
        """What is kept in a lane."""
        return [pinned for pinned in self._pinned.values() if pinned.lane == lane.index]

    def offer(self, seq: Sequence, now: float) -> HandoffReady | None:
        """Let what is computed of a prompt be fetched while the rest is; None where it has not grown by enough."""
        return self._offer(seq, seq.settled, now, step=-1)

    def offers(self, drafts: Iterable[LaneDraft], step: int, now: float) -> tuple[HandoffReady, ...]:
        """Let the prompts that a step completes be fetched layer by layer while it runs."""
        if not self._config.offers_layers:
            return ()
        ends = [work for draft in drafts for work in draft.works if work.samples]
        found = [self._offer(work.seq, work.end, now, step=step) for work in ends]
        return tuple(offer for offer in found if offer is not None)

    def _offer(self, seq: Sequence, end: int, now: float, *, step: int) -> HandoffReady | None:
        offered = 0 if seq.offer is None else seq.offer.num_tokens
        if seq.mode != "prefill" or seq.phase != "running" or end - offered < self._config.early_tokens:
            return None
        expires = now + self._config.lease_s
        seq.offer = Offer(ticket_id=self._ticket_id(seq), num_tokens=end, expires_unix_s=expires)
        return HandoffReady(
            request_id=seq.request.id,
            ticket_id=seq.offer.ticket_id,
            lane=seq.lane,
            blocks=tuple(seq.blocks[: self._config.blocks_for(end)]),
            state_slot=-1,
            num_tokens=end,
            expires_unix_s=expires,
            partial=True,
            step=step,
        )

    def hand_over(self, seq: Sequence, now: float) -> HandoffReady:
        """Keep what was prefilled for whoever fetches it."""
        ticket_id = self._ticket_id(seq)
        pinned = self._lanes[seq.lane].pin(seq, now + self._config.lease_s)
        self._pinned[ticket_id] = pinned
        return HandoffReady(
            request_id=seq.request.id,
            ticket_id=ticket_id,
            lane=seq.lane,
            blocks=pinned.blocks,
            state_slot=pinned.slot,
            num_tokens=seq.computed,
            expires_unix_s=pinned.expires_unix_s,
        )

    def _ticket_id(self, seq: Sequence) -> str:
        return f"{seq.request.id}/{next(self._ticket_ids)}" if seq.offer is None else seq.offer.ticket_id

    def keep_offered(self, seq: Sequence, offer: Offer) -> None:
        """A sequence ends of which others may be reading."""
        self._pinned[offer.ticket_id] = self._lanes[seq.lane].pin(seq, offer.expires_unix_s, state=False)

    def release(self, ticket_id: str) -> None:
        """Free what a ticket holds; unknown (released or expired) tickets are no error."""
        pinned = self._pinned.pop(ticket_id, None)
        if pinned is not None:
            self._lanes[pinned.lane].unpin(pinned)

    def release_of(self, request_id: RequestId) -> None:
        """Free what the tickets of a request hold."""
        for ticket_id in [key for key, pinned in self._pinned.items() if pinned.request_id == request_id]:
            self.release(ticket_id)

    def expire(self, now: float) -> None:
        """Free what is kept by tickets whose lease and grace are over."""
        limit = now - self._config.lease_grace_s
        for ticket_id in [key for key, pinned in self._pinned.items() if pinned.expires_unix_s < limit]:
            self.release(ticket_id)
