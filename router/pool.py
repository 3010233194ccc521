"""The members of one role and block size: what each would ask of a request, and what each has cached."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Final, Literal
from zlib import crc32

from router.load import CacheEvents, MemberLoad
from router.policy import Extra, PolicyConfig, Price, decode_price, mixed_price, prefill_price
from router.prefix_index import PrefixIndex
from router.prompt import Prompt
from router.request import MemberId

Part = Literal["prefill", "decode", "both"]
"""What of a request a member is asked for: its prompt and first token, the tokens behind that, or all of it."""

_Pricing = Callable[[MemberLoad, Extra, PolicyConfig], Price]
_PRICING: Final[dict[Part, _Pricing]] = {"prefill": prefill_price, "decode": decode_price, "both": mixed_price}
_MAX_SETS: Final = 4096
_MEMORY_S: Final = 30.0
"""Over which arrivals are averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The cheapest member of a pool for a request."""

    slot: int
    member_id: MemberId
    cost_s: float
    new_tokens: int
    """To compute, or to fetch."""
    cached_tokens: int


# Not frozen: its router brings it up to date, and tells its pool by `touch`.
@dataclass(slots=True, kw_only=True)
class Seat:
    """What the router knows of a member's load."""

    load: MemberLoad
    extra: Extra


class _PriceList:
    """The members' prices for one part of a request, as columns by slot; made when they are asked for."""

    def __init__(self, pricing: _Pricing, config: PolicyConfig) -> None:
        self._pricing = pricing
        self._config = config
        self.stale: set[int] = set()
        self.base: list[float] = []
        self.token: list[float] = []
        self.output: list[float] = []

    def refresh(self, seats: Sequence[Seat | None], arrivals_per_s: float) -> None:
        """Bring the columns up to date."""
        for column in (self.base, self.token, self.output):
            column.extend([0.0] * (len(seats) - len(column)))
        for slot in self.stale:
            seat = seats[slot]
            if seat is None or seat.load.draining:
                self.base[slot], self.token[slot], self.output[slot] = inf, 0.0, 0.0
            else:
                seat.extra.arrivals_per_s = arrivals_per_s
                price = self._pricing(seat.load, seat.extra, self._config)
                self.base[slot], self.token[slot], self.output[slot] = price.base_s, price.token_s, price.output_s
        self.stale.clear()


class Pool:
    """Used by one thread; times are unix seconds.

    Args:
        parts: what its members may be asked for.
        block_size: of all its members.
        config: prices.
        max_expected: see PrefixIndex.
    """

    def __init__(self, parts: Collection[Part], block_size: int, config: PolicyConfig, *, max_expected: int) -> None:
        self.block_size = block_size
        self._config = config
        self._lists = {part: _PriceList(_PRICING[part], config) for part in parts}
        self._stale = [prices.stale for prices in self._lists.values()]
        self._index = PrefixIndex(max_expected=max_expected)
        self._seats: list[Seat | None] = []
        self._free: list[int] = []
        self._recurrent = False
        self._slots: dict[int, tuple[int, ...]] = {}
        self._arrivals = 0.0
        self._arrived_s = -inf

    @property
    def arrivals_per_s(self) -> float:
        """Requests that were sent to a member, on average over the last while."""
        return self._arrivals / _MEMORY_S / max(len(self._seats) - len(self._free), 1)

    def add(self, seat: Seat) -> int:
        """Take a member in; returns its slot."""
        if self._free:
            slot = self._free.pop()
            self._seats[slot] = seat
        else:
            slot = len(self._seats)
            self._seats.append(seat)
        self._recurrent = seat.load.total_state_slots > 0
        self.touch(slot)
        return slot

    def touch(self, slot: int) -> None:
        """A member's seat has changed: price it anew."""
        for stale in self._stale:
            stale.add(slot)

    def leave(self, slot: int) -> None:
        """A member left."""
        self._seats[slot] = None
        self._free.append(slot)
        self._index.clear(slot)
        self.touch(slot)

    def take_events(self, slot: int, events: CacheEvents) -> None:
        """What happened in a member's prefix cache."""
        if events.cleared:
            self._index.clear(slot)
        self._index.remove(slot, events.removed, events.removed_states)
        self._index.store(slot, events.stored, events.stored_states)

    def snapshot(self, slot: int, sequence: int) -> CacheEvents:
        """What a member is known to hold, as it would tell it itself."""
        kv, states = self._index.held(slot)
        return CacheEvents(after=0, sequence=sequence, cleared=True, stored=kv, stored_states=states)

    def expect(self, offer: Offer, prompt: Prompt, now: float, until_s: float) -> None:
        """The prompt goes to a member, and will be in its cache."""
        self._arrivals = self._arrivals * exp(min(self._arrived_s - now, 0.0) / _MEMORY_S) + 1.0
        self._arrived_s = now
        seat = self._seats[offer.slot]
        if seat is not None and seat.load.prefix_cache:
            self._index.expect(offer.slot, prompt.hashes(self.block_size), until_s)

    def best(self, part: Part, prompt: Prompt, now: float, exclude: frozenset[MemberId]) -> Offer | None:
        """The cheapest member for a part of a request, among equals one that the prompt's key picks; None: nobody."""
        prices = self._lists[part]
        if prices.stale:
            prices.refresh(self._seats, self.arrivals_per_s)
        output = min(prompt.max_output, self._config.output_tokens)
        depths = self._depths(prompt, now)
        columns = zip(prices.base, prices.token, prices.output, self._new_tokens(prompt, depths), strict=True)
        costs = [base + new * token + output * one for base, token, one, new in columns]
        for slot, seat in enumerate(self._seats) if exclude else ():
            if seat is not None and seat.load.member_id in exclude:
                costs[slot] = inf
        least = min(costs, default=inf)
        if least == inf:
            return None
        limit = least + self._config.tie_s
        equal = [slot for slot, cost in enumerate(costs) if cost <= limit]
        slot = equal[crc32(prompt.key.encode()) % len(equal)]
        seat = self._seats[slot]
        assert seat is not None, "a price without a member"
        cached = self.block_size * next((depth for depth, members in depths if members >> slot & 1), 0)
        return Offer(
            slot=slot,
            member_id=seat.load.member_id,
            cost_s=costs[slot],
            new_tokens=prompt.num_tokens - cached,
            cached_tokens=cached,
        )

    def _depths(self, prompt: Prompt, now: float) -> list[tuple[int, int]]:
        """How many blocks of the prompt who can go on behind, as PrefixIndex tells it."""
        hashes = prompt.hashes(self.block_size)
        self._index.forget(now)
        depths = self._index.depths(hashes)
        return self._index.state_depths(hashes, depths) if self._recurrent and depths else depths

    def _new_tokens(self, prompt: Prompt, depths: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens of the prompt that each slot does not hold."""
        new = [prompt.num_tokens] * len(self._seats)
        for depth, members in depths:
            left = prompt.num_tokens - depth * self.block_size
            for slot in self._slots_of(members):
                new[slot] = left
        return new

    def _slots_of(self, members: int) -> tuple[int, ...]:
        """The slots in a bit set; the few sets that hold common prefixes come up again and again."""
        slots = self._slots.get(members)
        if slots is None:
            if len(self._slots) >= _MAX_SETS:
                self._slots.clear()
            slots = tuple(slot for slot, digit in enumerate(reversed(f"{members:b}")) if digit == "1")
            self._slots[members] = slots
        return slots
