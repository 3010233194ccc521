"""The members of one role and block size, and what each would ask of a request."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Final, Literal
from zlib import crc32

from router.load import MemberLoad
from router.policy import Extra, PolicyConfig, Price, decode_price, mixed_price, prefill_price
from router.prompt import Prompt
from router.request import MemberId

Part = Literal["prefill", "decode", "both"]
"""What of a request a member is asked for: its prompt and first token, the tokens behind that, or all of it."""

_Pricing = Callable[[MemberLoad, Extra, PolicyConfig], Price]
_PRICING: Final[dict[Part, _Pricing]] = {"prefill": prefill_price, "decode": decode_price, "both": mixed_price}
_FEW: Final = 32
"""Members of a set that are quicker found one by one."""
_NO_PRICE: Final = (inf, 0.0, 0.0)
_MEMORY_S: Final = 30.0
"""Over which arrivals are averaged."""


# Not frozen, as one is made for every decision; never changed once made.
@dataclass(slots=True, kw_only=True)
class Offer:
    """The cheapest member of a pool for a request."""

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
    """The members' prices for one part of a request, by slot; made from the first time on that they are asked for."""

    def __init__(self, pricing: _Pricing, config: PolicyConfig) -> None:
        self._pricing = pricing
        self._config = config
        self.asked = False
        self.stale: set[int] = set()
        self.rows: list[tuple[float, float, float]] = []
        """Base, token and output of each Price."""

    def refresh(self, seats: Sequence[Seat | None], arrivals_per_s: float) -> None:
        """Bring the rows up to date."""
        rows = self.rows
        rows.extend([_NO_PRICE] * (len(seats) - len(rows)))
        for slot in self.stale:
            seat = seats[slot]
            if seat is None or seat.load.draining:
                rows[slot] = _NO_PRICE
            else:
                seat.extra.arrivals_per_s = arrivals_per_s
                price = self._pricing(seat.load, seat.extra, self._config)
                rows[slot] = (price.base_s, price.token_s, price.output_s)
        self.stale.clear()


class Pool:
    """Used by one thread; times are unix seconds.

    Args:
        parts: what its members may be asked for.
        block_size: of all its members.
        config: prices.
    """

    def __init__(self, parts: Collection[Part], block_size: int, config: PolicyConfig) -> None:
        self.block_size = block_size
        self._config = config
        self._lists = {part: _PriceList(_PRICING[part], config) for part in parts}
        self._stale = [prices.stale for prices in self._lists.values()]
        self._seats: list[Seat | None] = []
        self._numbers: list[int] = []
        self._slots: dict[int, int] = {}
        """By number."""
        self._free: list[int] = []
        self._mask = 0
        """The numbers as a bit set."""
        self._arrivals = 0.0
        self._arrived_s = -inf

    @property
    def _arrivals_per_s(self) -> float:
        """Requests that were sent to a member, on average over the last while."""
        return self._arrivals / _MEMORY_S / max(len(self._slots), 1)

    def add(self, seat: Seat, number: int) -> int:
        """Take a member in, under its number in what `best` is told of caches; returns its slot."""
        if self._free:
            slot = self._free.pop()
            self._seats[slot], self._numbers[slot] = seat, number
        else:
            slot = len(self._seats)
            self._seats.append(seat)
            self._numbers.append(number)
        self._slots[number] = slot
        self._mask |= 1 << number
        self.touch(slot)
        return slot

    def touch(self, slot: int) -> None:
        """A member's seat has changed: price it anew."""
        for stale in self._stale:
            stale.add(slot)

    def refresh(self) -> None:
        """Price anew what has changed, so that no decision waits for it."""
        for prices in self._lists.values():
            if prices.asked and prices.stale:
                prices.refresh(self._seats, self._arrivals_per_s)

    def leave(self, slot: int) -> None:
        """A member left."""
        self._seats[slot] = None
        self._free.append(slot)
        del self._slots[self._numbers[slot]]
        self._mask ^= 1 << self._numbers[slot]
        self.touch(slot)

    def arrived(self, now: float) -> None:
        """A request goes to a member."""
        self._arrivals = self._arrivals * exp(min(self._arrived_s - now, 0.0) / _MEMORY_S) + 1.0
        self._arrived_s = now

    def best(
        self, part: Part, prompt: Prompt, depths: Sequence[tuple[int, int]], exclude: frozenset[MemberId]
    ) -> Offer | None:
        """The cheapest member for a part of a request, among equals one that the prompt's key picks; None: nobody.

        Args:
            depths: who can go on behind how many blocks of it, as Caches tells it.
        """
        prices = self._lists[part]
        prices.asked = True
        if prices.stale:
            prices.refresh(self._seats, self._arrivals_per_s)
        costs = self._costs(prices.rows, prompt, depths)
        for slot, seat in enumerate(self._seats) if exclude else ():
            if seat is not None and seat.load.member_id in exclude:
                costs[slot] = inf
        least = min(costs, default=inf)
        if least == inf:
            return None
        limit = least + self._config.tie_s
        equal = [slot for slot, cost in enumerate(costs) if cost <= limit]
        slot = equal[crc32(prompt.key.encode()) % len(equal)]
        seat, number = self._seats[slot], self._numbers[slot]
        assert seat is not None, "a price without a member"
        cached = self.block_size * next((depth for depth, members in depths if members >> number & 1), 0)
        return Offer(
            member_id=seat.load.member_id,
            cost_s=costs[slot],
            new_tokens=prompt.num_tokens - cached,
            cached_tokens=cached,
        )

    def _costs(
        self, rows: Sequence[tuple[float, float, float]], prompt: Prompt, depths: Sequence[tuple[int, int]]
    ) -> list[float]:
        """What each slot would take, by the tokens that it does not hold."""
        groups: list[tuple[int, int]] = []
        left, most, widest = self._mask, 0, 0
        for depth, told in depths:
            members = told & self._mask
            left ^= members
            groups.append((depth, members))
            if members.bit_count() > most:
                most, widest = members.bit_count(), depth
        # A common beginning is held by nearly all, or nothing by nobody: one by one only the others.
        if left.bit_count() >= most:
            widest = 0
        else:
            groups.append((0, left))
        output = min(prompt.max_output, self._config.output_tokens)
        new = prompt.num_tokens - widest * self.block_size
        costs = [base + new * token + output * one for base, token, one in rows]
        for depth, members in groups:
            if members and depth != widest:
                new = prompt.num_tokens - depth * self.block_size
                for slot in self._slots_of(members):
                    base, token, one = rows[slot]
                    costs[slot] = base + new * token + output * one
        return costs

    def _slots_of(self, members: int) -> Iterator[int]:
        """The slots in a bit set."""
        if members.bit_count() < _FEW:
            while members:
                number = members.bit_length() - 1
                yield self._slots[number]
                members ^= 1 << number
        else:
            for number, digit in enumerate(reversed(f"{members:b}")):
                if digit == "1":
                    yield self._slots[number]
