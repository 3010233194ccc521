"""The directory: which members are up, where, and in what state. A plain class, and the named Ray actor it runs as."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import ray
from ray.actor import ActorProxy

from cluster.members import MemberInfo
from cluster.security import new_token
from router.errors import ConfigError
from router.load import MemberLoad
from router.request import MemberId, Role

ACTOR_NAME: Final = "moefleet-directory"
_MAX_WATCH_S: Final = 30.0
_ROLES_AT_WORK: Final[tuple[Role, ...]] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """One rank's process."""

    rank: int
    pid: int
    node: str
    """Address of its node."""
    state: Literal["up", "starting", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """What a member's supervisor reports of it, about once a second."""

    info: MemberInfo
    ranks: tuple[RankStatus, ...]
    tp: int
    dp: int
    ep: int
    max_model_len: int
    """Prompt and output tokens of one request that fit this member."""
    since_unix_s: float
    """When this generation came up."""
    load: MemberLoad | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What a gateway is told."""

    version: int
    """Grows with every change of `members`."""
    members: tuple[MemberInfo, ...]
    max_model_len: dict[Role, int]
    """By role, the least of the members that are up, or that were when the last one left: what can be promised to a
    client."""
    settled: bool
    """False while the directory is so young that members of before its restart may not have come back to it: one that
    is not listed may be up."""


class Directory:
    """Members by id, each until it is removed or its supervisor has been silent for `lease_s`.

    Args:
        token: the cluster token, which this actor hands to members and gateways: Ray authenticates who may ask.
        lease_s: seconds.
        clock: steady seconds.
    """

    def __init__(self, token: str, *, lease_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token
        self._lease_s = lease_s
        self._clock = clock
        self._members: dict[MemberId, tuple[MemberStatus, float]] = {}
        self._max_model_len: dict[Role, int] = {}
        self._wanted_roles: dict[MemberId, Role] = {}
        self._version = 0
        self._settled = False
        self._settles_at = clock() + lease_s
        self._changed = asyncio.Event()

    @ray.method
    async def token(self) -> str:
        """The cluster token."""
        return self._token

    @ray.method
    async def put(self, status: MemberStatus) -> Role | None:
        """Enter a member or renew its lease; returns the role it shall have, None where nobody moved it."""
        member_id = status.info.member_id
        known = self._members.get(member_id)
        self._members[member_id] = (status, self._clock() + self._lease_s)
        if known is None or known[0].info != status.info:
            self._change()
        return self._wanted_roles.get(member_id)

    @ray.method
    async def set_role(self, member_id: MemberId, role: Role) -> None:
        """Let a member take another role with its next report; its streams go on.

        Raises:
            ConfigError: the member is not up, or nobody would prefill or decode any more.
        """
        self._expire()
        if member_id not in self._members:
            known = ", ".join(sorted(self._members)) or "none"
            raise ConfigError(f"member {member_id!r} is not up; members are {known}")
        roles = {each: self._wanted_roles.get(each, status.info.role) for each, (status, _) in self._members.items()}
        roles[member_id] = role
        for needed in _ROLES_AT_WORK:
            if not {needed, "mixed"} & set(roles.values()):
                raise ConfigError(
                    f"role {role!r} for member {member_id} would leave no member to {needed}; "
                    f"give another one the role {needed} or mixed first"
                )
        self._wanted_roles[member_id] = role

    @ray.method
    async def remove(self, member_id: MemberId) -> None:
        """Take a member out; unknown ids are no error."""
        if self._members.pop(member_id, None) is not None:
            self._change()

    @ray.method
    async def watch(self, version: int, timeout_s: float) -> Membership:
        """The membership, as soon as it is another than `version`, or after `timeout_s` as it is."""
        deadline = self._clock() + min(timeout_s, _MAX_WATCH_S)
        while True:
            self._expire()
            left = deadline - self._clock()
            if self._version != version or left <= 0:
                return self._membership()
            try:
                # In pieces, so that leases are looked at.
                await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
            except TimeoutError:
                continue

    @ray.method
    async def statuses(self) -> tuple[MemberStatus, ...]:
        """Everything known of every member, by role and id."""
        self._expire()
        found = [status for status, _ in self._members.values()]
        return tuple(sorted(found, key=lambda status: (status.info.role, status.info.member_id)))

    def _expire(self) -> None:
        now = self._clock()
        gone = [member_id for member_id, (_, until) in self._members.items() if until < now]
        for member_id in gone:
            del self._members[member_id]
        self._wanted_roles = {each: role for each, role in self._wanted_roles.items() if each in self._members}
        settles = not self._settled and now >= self._settles_at
        self._settled |= settles
        if gone or settles:
            self._change()

    def _membership(self) -> Membership:
        members = tuple(status.info for status, _ in self._members.values())
        return Membership(
            version=self._version, members=members, max_model_len=dict(self._max_model_len), settled=self._settled
        )

    def _change(self) -> None:
        up = [status for status, _ in self._members.values()]
        for role in {status.info.role for status in up}:
            self._max_model_len[role] = min(each.max_model_len for each in up if each.info.role == role)
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


DirectoryActor = ray.remote(Directory)


def open_directory(namespace: str) -> "ActorProxy[Directory]":
    """The application's directory, made by whoever asks first; it outlives gateways and members.

    Restarted by Ray after a death it has the same token, and members enter themselves again with their next report.
    """
    options = DirectoryActor.options(
        name=ACTOR_NAME,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,
    )
    return options.remote(new_token())


def find_directory(namespace: str) -> "ActorProxy[Directory] | None":
    """The directory if one is there."""
    try:
        return ray.get_actor(ACTOR_NAME, namespace=namespace)
    except ValueError:
        return None
