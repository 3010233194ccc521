from cluster.plan import HandoffReady, KvLayout, SourceRank
from cluster.ticket import ticket_maker
from router.request import MemberId, RequestId

LAYOUT = KvLayout(fingerprint="f", tp=1, block_size=16, num_blocks=8, num_slots=2, dtype="float32")


def make_sources(lane: int) -> tuple[SourceRank, ...]:
    return (SourceRank(tp_rank=0, host_key="h", pid=1, pool_fd=3, address=f"127.0.0.1:{4000 + lane}"),)


def test_a_ticket_names_the_ranks_of_the_lane_that_holds_the_sequence() -> None:
    ready = HandoffReady(
        request_id=RequestId("r"),
        ticket_id="t/0",
        lane=1,
        blocks=(3, 1),
        state_slot=0,
        num_tokens=20,
        expires_unix_s=9.0,
    )
    ticket = ticket_maker(MemberId("p0"), LAYOUT, make_sources)(ready)

    assert ticket.ranks == make_sources(1)
    assert (ticket.id, ticket.member_id, ticket.layout) == ("t/0", "p0", LAYOUT)
    assert (ticket.blocks, ticket.state_slot, ticket.num_tokens, ticket.expires_unix_s) == ((3, 1), 0, 20, 9.0)
