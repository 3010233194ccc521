"""What the directory says of one member: plain data, enough for a gateway to connect to it."""

from dataclasses import dataclass

from router.request import MemberId, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberInfo:
    """One member that is up."""

    member_id: MemberId
    role: Role
    """What the member does now; moved at run time by `Directory.set_role`."""
    address: str
    """host:port of its member service."""
    generation: int = 0
    """Grows each time the member's ranks were formed anew; a stream of another generation is not this member."""
