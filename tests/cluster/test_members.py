from cluster.members import MemberInfo
from router.request import MemberId


def test_a_member_formed_anew_is_not_the_member_before() -> None:
    first = MemberInfo(member_id=MemberId("d0"), role="decode", address="127.0.0.1:4000")
    again = MemberInfo(member_id=MemberId("d0"), role="decode", address="127.0.0.1:4000", generation=1)
    assert first != again
