"""Chooses the members that serve a request, from their reports and from what was routed since."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from router.caches import Caches
from router.errors import ConfigError, NoMemberError
from router.load import CacheEvents, MemberLoad
from router.policy import Extra, PolicyConfig
from router.pool import Offer, Part, Pool, Seat
from router.prompt import Prompt
from router.request import MemberId, Role

_PARTS: Final[dict[Role, tuple[Part, ...]]] = {
    "prefill": ("prefill",),
    "decode": ("decode", "both"),
    "mixed": ("decode", "both"),
}
_PoolKey = tuple[Role, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How long the router believes what it remembers, and how much it remembers."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    recent_s: float = 2.0
    """A routed request counts on top of its member's report for this long, or until the second report after it."""
    expected_s: float = 30.0
    """A routed prompt counts as cached on its member for this long; then only the member's word counts."""
    max_expected: int = 262_144
    """Block hashes remembered that way; the oldest are forgotten first."""

    def __post_init__(self) -> None:
        for name in ("recent_s", "expected_s", "max_expected"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"router.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes."""

    prefill: MemberId | None
    """None: the decode member computes the prompt itself."""
    decode: MemberId
    cached_tokens: int
    """Prompt tokens expected in the prefix cache of the member that computes the prompt."""
    cost_s: float
    """What the router predicts it to cost; comparable between requests of one size."""


class _Routed:
    """A request that went to a member, which counts it until it must be in the member's numbers.

    Args:
        member_id: the member.
        key: the request's.
        until_s: when it counts no more in any case.
        report: the member's report after which it must be in its numbers.
        tokens: of its prompt, as far as they are not known to be computed.
        held_tokens: whose KV the member will hold.
    """

    __slots__ = ("held_tokens", "key", "member_id", "report", "tokens", "until_s")

    def __init__(
        self, member_id: MemberId, key: str, until_s: float, report: int, tokens: int, held_tokens: int
    ) -> None:
        self.member_id = member_id
        self.key = key
        self.until_s = until_s
        self.report = report
        self.tokens = tokens
        self.held_tokens = held_tokens


# Not frozen, as one is made for every decision; never changed once made.
@dataclass(slots=True, kw_only=True)
class _Asked:
    """A request that is being routed."""

    prompt: Prompt
    now: float
    exclude: frozenset[MemberId]
    depths: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Who can go on behind how many of its blocks, by block size; looked up once."""


class _Member:
    """What the router knows of one member."""

    def __init__(self, load: MemberLoad, pool: Pool, caches: Caches, number: int) -> None:
        self.seat = Seat(load=load, extra=Extra())
        self.pool = pool
        self.slot = pool.add(self.seat, number)
        self.caches = caches
        self.number = number
        self.reports = 0
        self.routed: deque[_Routed] = deque()
        self.sequence: int | None = None
        """Of the cache events that were taken in; None: a snapshot is due."""

    def report(self, load: MemberLoad, now: float) -> None:
        """Take its next report."""
        self.seat.load = load
        self.reports += 1
        self.settle(now)
        self.pool.touch(self.slot)
        self.pool.refresh()

    def note(self, entry: _Routed) -> None:
        """A request goes to it."""
        self.routed.append(entry)
        self._count(entry, 1)

    def started(self, key: str) -> None:
        """A request's prompt is computed, whatever the last report says."""
        for entry in self.routed:
            if entry.key == key:
                self._count(entry, -1)
                entry.tokens = 0
                self._count(entry, 1)

    def settle(self, now: float) -> None:
        """Forget what was routed long enough ago. A request may cross the first report on the way, not the second."""
        routed = self.routed
        while routed and (routed[0].report <= self.reports or routed[0].until_s <= now):
            self._count(routed.popleft(), -1)

    def _count(self, entry: _Routed, sign: int) -> None:
        extra = self.seat.extra
        extra.requests += sign
        extra.tokens += sign * entry.tokens
        extra.held_tokens += sign * entry.held_tokens
        self.pool.touch(self.slot)


class Router:
    """The members' latest reports and what was routed since. Used by one thread; times are unix seconds."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self._config = config or RouterConfig()
        self._members: dict[MemberId, _Member] = {}
        self._pools: dict[_PoolKey, Pool] = {}
        self._pools_of: dict[Role, list[Pool]] = {}
        self._caches: dict[int, Caches] = {}
        self._recent: deque[_Routed] = deque()

    @property
    def loads(self) -> tuple[MemberLoad, ...]:
        """The latest report of each member."""
        return tuple(member.seat.load for member in self._members.values())

    @property
    def backlog_tokens(self) -> int:
        """Prompt tokens before those who compute prompts: the prefill pool, or all where there is none."""
        seats = [member.seat for member in self._members.values() if not member.seat.load.draining]
        computing = [seat for seat in seats if seat.load.role == "prefill"] or seats
        return sum(seat.load.waiting_tokens + seat.extra.tokens for seat in computing)

    @property
    def block_sizes(self) -> frozenset[int]:
        """Those in use: prompts are hashed by them."""
        return frozenset(block_size for _, block_size in self._pools)

    def update(self, load: MemberLoad, now: float) -> None:
        """Take a member's report; its first one makes it known."""
        member = self._members.get(load.member_id)
        before = None if member is None else member.seat.load
        if member is None or before is None or (before.role, before.block_size) != (load.role, load.block_size):
            self._members[load.member_id] = self._join(load, member)
        else:
            member.report(load, now)
            # Or the next decision would have to.
            member.caches.forget(now)

    def _join(self, load: MemberLoad, before: _Member | None) -> _Member:
        """A member that is new, or has another role: then its cache is what it was."""
        caches = self._caches.get(load.block_size)
        if caches is None:
            caches = self._caches[load.block_size] = Caches(load.block_size, max_expected=self._config.max_expected)
        if before is not None:
            before.pool.leave(before.slot)
            if before.caches is caches:
                member = _Member(load, self._pool(load), caches, before.number)
                member.sequence = before.sequence
                return member
            before.caches.leave(before.number)
        return _Member(load, self._pool(load), caches, caches.add(load))

    def take_events(self, member_id: MemberId, events: CacheEvents) -> bool:
        """Take what happened in a known member's prefix cache.

        Returns:
            False where events are missing before these: nothing was taken in, a snapshot is needed.
        """
        member = self._members.get(member_id)
        if member is None or not (events.cleared or events.after == member.sequence):
            return False
        member.caches.take_events(member.number, events)
        member.sequence = events.sequence
        return True

    def remove(self, member_id: MemberId) -> None:
        """Forget a member that left or died; unknown ids are no error."""
        member = self._members.pop(member_id, None)
        if member is not None:
            member.pool.leave(member.slot)
            member.caches.leave(member.number)

    def started(self, member_id: MemberId, key: str) -> None:
        """The request with this prompt key has its first token from a member: nobody waits for its prompt there.

        The member's reports tell so too, but later, and whoever comes next is to have its place. Unknown ones are no
        error.
        """
        member = self._members.get(member_id)
        if member is not None:
            member.started(key)

    def route(self, prompt: Prompt, now: float, *, exclude: frozenset[MemberId] = frozenset()) -> Route:
        """Choose members and remember the choice.

        With a prefill pool up, one of it and one that decodes, unless a mixed member does both for less. Without, a
        mixed member, or a decode member where there is no mixed one. Draining members and those in `exclude` get
        nothing.

        Raises:
            NoMemberError: nobody can decode.
        """
        self._forget_old(now)
        asked = _Asked(prompt=prompt, now=now, exclude=exclude)
        pair = self._pair(asked)
        alone = self._best("mixed", "both", asked)
        if pair is None and alone is None:
            alone = self._best("decode", "both", asked)
        if pair is not None and (alone is None or pair[0].cost_s + pair[1].cost_s <= alone.cost_s):
            self._expect([self._note(offer, prompt, now) for offer in pair], prompt, now)
            return _route(pair[0], pair[1])
        if alone is None:
            raise NoMemberError(
                f"no decode or mixed member is up of {len(self._members)} known; wait for the pool to heal"
            )
        self._expect([self._note(alone, prompt, now)], prompt, now)
        return _route(None, alone)

    def _pair(self, asked: _Asked) -> tuple[Offer, Offer] | None:
        first = self._best("prefill", "prefill", asked)
        if first is None:
            return None
        second = self._best("decode", "decode", asked)
        second = second or self._best("mixed", "decode", asked)
        return None if second is None else (first, second)

    def _best(self, role: Role, part: Part, asked: _Asked) -> Offer | None:
        found: Offer | None = None
        for pool in self._pools_of.get(role, ()):
            depths = asked.depths.get(pool.block_size)
            if depths is None:
                depths = self._caches[pool.block_size].depths(asked.prompt, asked.now)
                asked.depths[pool.block_size] = depths
            offer = pool.best(part, asked.prompt, depths, asked.exclude)
            if offer is not None and (found is None or offer.cost_s < found.cost_s):
                found = offer
        return found

    def _note(self, offer: Offer, prompt: Prompt, now: float) -> _Member:
        """Remember a request that goes to a member: until its reports tell of it."""
        member = self._members[offer.member_id]
        output = min(prompt.max_output, self._config.policy.output_tokens)
        entry = _Routed(
            offer.member_id,
            prompt.key,
            until_s=now + self._config.recent_s,
            report=member.reports + 2,
            tokens=offer.new_tokens,
            held_tokens=prompt.num_tokens + (0 if member.seat.load.role == "prefill" else int(output)),
        )
        member.note(entry)
        self._recent.append(entry)
        member.pool.arrived(now)
        return member

    def _expect(self, members: Sequence[_Member], prompt: Prompt, now: float) -> None:
        """The prompt will soon be in these members' caches."""
        numbers: dict[Caches, list[int]] = {}
        for member in members:
            if member.seat.load.prefix_cache:
                numbers.setdefault(member.caches, []).append(member.number)
        for caches, sent in numbers.items():
            caches.expect(sent, prompt, now + self._config.expected_s)

    def _forget_old(self, now: float) -> None:
        """Price members anew that have not reported for long after something was routed to them."""
        while self._recent and self._recent[0].until_s <= now:
            member = self._members.get(self._recent.popleft().member_id)
            if member is not None:
                member.settle(now)

    def _pool(self, load: MemberLoad) -> Pool:
        key = (load.role, load.block_size)
        pool = self._pools.get(key)
        if pool is None:
            pool = Pool(_PARTS[load.role], load.block_size, self._config.policy)
            self._pools[key] = pool
            self._pools_of.setdefault(load.role, []).append(pool)
        return pool


def _route(prefill: Offer | None, decode: Offer) -> Route:
    computes = prefill or decode
    return Route(
        prefill=None if prefill is None else prefill.member_id,
        decode=decode.member_id,
        cached_tokens=computes.cached_tokens,
        cost_s=decode.cost_s + (0.0 if prefill is None else prefill.cost_s),
    )
