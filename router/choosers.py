"""Who gets a request, by the router's cost model and by the simple rules it is compared with."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, Protocol
from zlib import crc32

from router.errors import ConfigError
from router.load import CacheEvents, MemberLoad
from router.prefix_index import PrefixIndex
from router.prompt import Prompt
from router.request import MemberId
from router.router import Router, RouterConfig

PolicyName = Literal["round-robin", "least-load", "prefix-only", "session-hash", "cost"]


class Chooser(Protocol):
    """A routing policy as the simulation drives it; times are seconds on its clock."""

    def join(self, member_id: MemberId) -> None:
        """A member is up."""
        ...

    def leave(self, member_id: MemberId) -> None:
        """A member takes no more requests; those that it has may still end."""
        ...

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """A member for a request whose full blocks are `blocks`."""
        ...

    def started(self, member_id: MemberId, key: str) -> None:
        """A request that went to a member has its first token; `key` is its prompt's."""
        ...

    def ended(self, member_id: MemberId) -> None:
        """A request that went to a member has ended."""
        ...

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """A member's report."""
        ...


class _Blind:
    """What a policy does that looks at no report: count its own requests."""

    def __init__(self, members: Sequence[MemberId]) -> None:
        self.members = list(members)
        self.outstanding: Counter[MemberId] = Counter()

    def take(self, member_id: MemberId) -> MemberId:
        """Count a request that goes to a member."""
        self.outstanding[member_id] += 1
        return member_id

    def least(self, members: Sequence[MemberId]) -> MemberId:
        """The first of those with the fewest requests."""
        return min(members, key=self.outstanding.__getitem__)


class RoundRobin:
    """Each member in turn."""

    def __init__(self, members: Sequence[MemberId]) -> None:
        self._members = list(members)
        self._next = 0

    def join(self, member_id: MemberId) -> None:
        """One more."""
        self._members.append(member_id)

    def leave(self, member_id: MemberId) -> None:
        """One less."""
        self._members.remove(member_id)

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """The next one."""
        del prompt, blocks, now
        self._next += 1
        return self._members[(self._next - 1) % len(self._members)]

    def started(self, member_id: MemberId, key: str) -> None:
        """Of no interest."""

    def ended(self, member_id: MemberId) -> None:
        """Of no interest."""

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """Of no interest."""


class LeastLoad:
    """The member with the fewest requests, which the gateway knows without reports."""

    def __init__(self, members: Sequence[MemberId]) -> None:
        self._blind = _Blind(members)

    def join(self, member_id: MemberId) -> None:
        """One more."""
        self._blind.members.append(member_id)

    def leave(self, member_id: MemberId) -> None:
        """One less."""
        self._blind.members.remove(member_id)

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """The least loaded one."""
        del prompt, blocks, now
        return self._blind.take(self._blind.least(self._blind.members))

    def started(self, member_id: MemberId, key: str) -> None:
        """Of no interest."""

    def ended(self, member_id: MemberId) -> None:
        """One less."""
        self._blind.outstanding[member_id] -= 1

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """Of no interest."""


class PrefixOnly:
    """The member with the longest cached prefix; among equals the one with the fewest requests."""

    def __init__(self, members: Sequence[MemberId], config: RouterConfig) -> None:
        self._blind = _Blind(members)
        self._slots = {member_id: slot for slot, member_id in enumerate(members)}
        self._config = config
        self._index = PrefixIndex(max_expected=config.max_expected)

    def join(self, member_id: MemberId) -> None:
        """One more, under a number that nobody had."""
        self._slots[member_id] = len(self._slots)
        self._blind.members.append(member_id)

    def leave(self, member_id: MemberId) -> None:
        """One less."""
        self._index.clear(self._slots[member_id])
        self._blind.members.remove(member_id)

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """The one that holds most."""
        del prompt
        self._index.forget(now)
        members = self._blind.members
        depths = self._index.depths(blocks)
        if depths:
            members = [each for each in members if depths[0][1] >> self._slots[each] & 1]
        chosen = self._blind.take(self._blind.least(members))
        self._index.expect((self._slots[chosen],), blocks, now + self._config.expected_s)
        return chosen

    def started(self, member_id: MemberId, key: str) -> None:
        """Of no interest."""

    def ended(self, member_id: MemberId) -> None:
        """One less."""
        self._blind.outstanding[member_id] -= 1

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """Take in what it caches."""
        del now
        if events is not None:
            slot = self._slots[load.member_id]
            self._index.remove(slot, events.removed, ())
            self._index.store(slot, events.stored, ())


class SessionHash:
    """A member by the hash of the session; a trace without names has a session where a prompt goes on with another."""

    _COMMON_BLOCKS = 1
    """Blocks at the start that many sessions share: a system prompt."""

    def __init__(self, members: Sequence[MemberId]) -> None:
        self._members = list(members)
        self._session_of: dict[int, str] = {}

    def join(self, member_id: MemberId) -> None:
        """One more."""
        self._members.append(member_id)

    def leave(self, member_id: MemberId) -> None:
        """One less."""
        self._members.remove(member_id)

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """Always the same one for a session."""
        del now
        own = blocks[self._COMMON_BLOCKS :]
        session = next((self._session_of[each] for each in reversed(own) if each in self._session_of), prompt.key)
        for block in own:
            self._session_of.setdefault(block, session)
        return self._members[crc32(session.encode()) % len(self._members)]

    def started(self, member_id: MemberId, key: str) -> None:
        """Of no interest."""

    def ended(self, member_id: MemberId) -> None:
        """Of no interest."""

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """Of no interest."""


class CostModel:
    """The router as gateways run it."""

    def __init__(self, config: RouterConfig) -> None:
        self._router = Router(config)

    def join(self, member_id: MemberId) -> None:
        """Its first report tells."""

    def leave(self, member_id: MemberId) -> None:
        """As the directory tells a gateway."""
        self._router.remove(member_id)

    def choose(self, prompt: Prompt, blocks: Sequence[int], now: float) -> MemberId:
        """The cheapest one."""
        del blocks
        return self._router.route(prompt, now).decode

    def started(self, member_id: MemberId, key: str) -> None:
        """Its prompt is computed."""
        self._router.started(member_id, key)

    def ended(self, member_id: MemberId) -> None:
        """The member's next report tells."""

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """Take it in."""
        self._router.update(load, now)
        if events is not None:
            taken = self._router.take_events(load.member_id, events)
            assert taken, f"{load.member_id}: cache events {events.sequence} do not follow"


_MAKERS: Final[dict[PolicyName, Callable[[Sequence[MemberId], RouterConfig], Chooser]]] = {
    "round-robin": lambda members, _: RoundRobin(members),
    "least-load": lambda members, _: LeastLoad(members),
    "prefix-only": PrefixOnly,
    "session-hash": lambda members, _: SessionHash(members),
    "cost": lambda _, config: CostModel(config),
}
POLICIES: Final = tuple(_MAKERS)


def policy_names(names: Iterable[str]) -> tuple[PolicyName, ...]:
    """Policies by their names.

    Raises:
        ConfigError: a name is none of ours.
    """
    given, known = tuple(names), {str(name): name for name in POLICIES}
    for name in given:
        if name not in known:
            raise ConfigError(f"policies: {name} is none of {', '.join(POLICIES)}")
    return tuple(known[name] for name in given)


def make_chooser(name: PolicyName, members: Sequence[MemberId], config: RouterConfig) -> Chooser:
    """A policy by its name, for a fleet of these members."""
    return _MAKERS[name](members, config)
