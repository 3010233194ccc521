"""Makes the claim on prefilled KV that another member redeems."""

from collections.abc import Callable

from cluster.plan import HandoffReady, KvLayout, KvTicket, SourceRank
from router.request import MemberId


def ticket_maker(
    member_id: MemberId, layout: KvLayout, sources: Callable[[int], tuple[SourceRank, ...]]
) -> Callable[[HandoffReady], KvTicket]:
    """A function that names a member's prefilled blocks to the outside.

    Args:
        sources: where the ranks of a lane can be read, such as `RankGroup.sources`.
    """

    def make(ready: HandoffReady) -> KvTicket:
        return KvTicket(
            id=ready.ticket_id,
            member_id=member_id,
            layout=layout,
            ranks=sources(ready.lane),
            blocks=ready.blocks,
            state_slot=ready.state_slot,
            num_tokens=ready.num_tokens,
            expires_unix_s=ready.expires_unix_s,
            partial=ready.partial,
            step=ready.step,
        )

    return make
