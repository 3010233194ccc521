"""What a gateway reads and decides before and beside its serving."""

from cluster.directory import Membership
from cluster.members import MemberInfo
from deploy.gateway import members_to_serve
from router.request import MemberId


def make_member(name: str, *, generation: int = 0) -> MemberInfo:
    return MemberInfo(member_id=MemberId(name), role="decode", address="127.0.0.1:1", generation=generation)


def make_membership(*members: MemberInfo, settled: bool) -> Membership:
    return Membership(version=1, members=members, max_model_len={}, settled=settled)


def test_members_that_a_restarted_directory_has_not_heard_of_yet_are_kept() -> None:
    known = (make_member("a"), make_member("b"))
    told = make_membership(make_member("a", generation=1), settled=False)
    assert members_to_serve(known, told) == (make_member("a", generation=1), make_member("b"))


def test_members_that_a_settled_directory_does_not_list_are_left() -> None:
    told = make_membership(make_member("a"), settled=True)
    assert members_to_serve((make_member("a"), make_member("b")), told) == told.members
