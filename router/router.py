"""Chooses the members that serve a request, from their load reports and from what was routed since."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from zlib import crc32

from router.errors import ConfigError, NoMemberError
from router.load import MemberLoad
from router.policy import Ask, Extra, PolicyConfig, decode_cost_s, mixed_cost_s, prefill_cost_s
from router.prefix import block_hashes
from router.request import MemberId, Request

_Cost = Callable[[MemberLoad, Extra, Ask, PolicyConfig], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How long the router believes what it remembers, and how much it remembers."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    recent_s: float = 2.0
    """A routed request counts on top of its member's report for this long, or until the second report after it."""
    learned_s: float = 30.0
    """A routed prompt counts as cached on its member for this long, or until a report says so."""
    max_learned: int = 16_384
    """Block hashes remembered that way, per member; the oldest are forgotten first."""

    def __post_init__(self) -> None:
        for name in ("recent_s", "learned_s", "max_learned"):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routed:
    at_s: float
    report: int
    """Reports seen from the member by then."""
    tokens: int


class _Member:
    """What the router knows of one member."""

    def __init__(self, load: MemberLoad) -> None:
        self.load = load
        self.reports = 0
        self._routed: deque[_Routed] = deque()
        self._learned: dict[int, float] = {}

    def update(self, load: MemberLoad) -> None:
        """Take a report. What the digest confirms need not be remembered."""
        self.load = load
        self.reports += 1
        for value in self._learned.keys() & load.prefix_digest:
            del self._learned[value]

    def extra(self, now: float, recent_s: float) -> Extra:
        """What was routed here lately. A request may cross the first report on the way, not the second."""
        while self._routed:
            oldest = self._routed[0]
            if oldest.report + 2 > self.reports and oldest.at_s + recent_s > now:
                break
            self._routed.popleft()
        return Extra(requests=len(self._routed), tokens=sum(entry.tokens for entry in self._routed))

    def cached_blocks(self, hashes: list[int], now: float) -> int:
        """Leading blocks that are, or will soon be, in this member's prefix cache."""
        if not self.load.prefix_cache:
            return 0
        digest, learned = self.load.prefix_digest, self._learned
        for index, value in enumerate(hashes):
            if value not in digest and learned.get(value, now) <= now:
                return index
        return len(hashes)

    def note(self, hashes: list[int], tokens: int, now: float, config: RouterConfig) -> None:
        """Remember a request that goes here."""
        self._routed.append(_Routed(at_s=now, report=self.reports, tokens=tokens))
        for value in hashes:
            if value not in self.load.prefix_digest:
                self._learned.pop(value, None)
                self._learned[value] = now + config.learned_s
        while len(self._learned) > config.max_learned:
            del self._learned[next(iter(self._learned))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    member: _Member
    ask: Ask


class Router:
    """The members' latest reports and what was routed since. Used by one thread; times are unix seconds."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self._config = config or RouterConfig()
        self._members: dict[MemberId, _Member] = {}

    @property
    def loads(self) -> tuple[MemberLoad, ...]:
        """The latest report of each member."""
        return tuple(member.load for member in self._members.values())

    def update(self, load: MemberLoad) -> None:
        """Take a member's report; its first one makes it known."""
        member = self._members.get(load.member_id)
        if member is None:
            self._members[load.member_id] = _Member(load)
        else:
            member.update(load)

    def remove(self, member_id: MemberId) -> None:
        """Forget a member that left or died; unknown ids are no error."""
        self._members.pop(member_id, None)

    def route(self, request: Request, now: float, *, exclude: frozenset[MemberId] = frozenset()) -> Route:
        """Choose members and remember the choice.

        With a prefill and a decode pool up, one of each. Without a prefill pool a mixed member serves both phases,
        or a decode member does where there is no mixed one. Draining members and those in `exclude` get nothing.

        Raises:
            NoMemberError: nobody can decode.
        """
        members = [
            member
            for member_id, member in self._members.items()
            if not member.load.draining and member_id not in exclude
        ]
        prefill = [member for member in members if member.load.role == "prefill"]
        mixed = [member for member in members if member.load.role == "mixed"]
        decode = [member for member in members if member.load.role == "decode"]
        if not mixed and not decode:
            raise NoMemberError(
                f"no decode or mixed member is up of {len(self._members)} known; wait for the pool to heal"
            )
        hashes = _Hashes(request)
        if not prefill:
            alone = self._choose(mixed or decode, mixed_cost_s, hashes, now)
            self._note(alone, hashes, now)
            return Route(prefill=None, decode=alone.member.load.member_id, cached_tokens=alone.ask.cached_tokens)
        first = self._choose(prefill, prefill_cost_s, hashes, now)
        second = self._choose(decode or mixed, decode_cost_s, hashes, now)
        self._note(first, hashes, now)
        self._note(second, hashes, now)
        return Route(
            prefill=first.member.load.member_id,
            decode=second.member.load.member_id,
            cached_tokens=first.ask.cached_tokens,
        )

    def _choose(self, members: Iterable[_Member], cost: _Cost, hashes: "_Hashes", now: float) -> _Choice:
        """The cheapest member; among equals one that the request's id picks."""
        policy = self._config.policy
        priced = []
        for member in members:
            size = member.load.block_size
            cached = member.cached_blocks(hashes.of(size), now) * size
            choice = _Choice(member=member, ask=Ask(num_tokens=hashes.num_tokens, cached_tokens=cached))
            priced.append((cost(member.load, member.extra(now, self._config.recent_s), choice.ask, policy), choice))
        limit = min(price for price, _ in priced) + policy.tie_s
        equal = [choice for price, choice in priced if price <= limit]
        return min(equal, key=lambda choice: hashes.tie(choice.member.load.member_id))

    def _note(self, choice: _Choice, hashes: "_Hashes", now: float) -> None:
        load = choice.member.load
        known = hashes.of(load.block_size) if load.prefix_cache else []
        choice.member.note(known, choice.ask.new_tokens, now, self._config)


class _Hashes:
    """A request's block hashes, made once for each block size in use."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens = request.prompt_ids + request.output_ids
        self._by_size: dict[int, list[int]] = {}
        self.num_tokens = len(self._tokens)

    def of(self, block_size: int) -> list[int]:
        """Hashes of the full blocks that can be found: never the one with the last token."""
        hashes = self._by_size.get(block_size)
        if hashes is None:
            hashes = block_hashes(self._tokens[:-1], block_size, self._request.cache_salt)
            self._by_size[block_size] = hashes
        return hashes

    def tie(self, member_id: MemberId) -> int:
        """Where the request's id puts a member among equals."""
        return crc32(f"{self._request.id}|{member_id}".encode())
