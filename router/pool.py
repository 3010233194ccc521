"""The members of one role and block size: what each would ask of a request, and what each has cached."""

from collections.abc import Callable, Collection
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
_NOBODY: Final = Price(base_s=inf, token_s=0.0, output_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The cheapest member of a pool for a request."""

    slot: int
    member_id: MemberId
    cost_s: float
    new_tokens: int
    """To compute, or to fetch."""
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    load: MemberLoad
    extra: Extra


class _PriceList:
    """The members' prices for one part of a request, as columns by slot; made when they are asked for."""

    def __init__(self, pricing: _Pricing, config: PolicyConfig) -> None:
        self._pricing = pricing
        self._config = config
        self._stale: dict[int, _Entry | None] = {}
        self.base: list[float] = []
        self.token: list[float] = []
        self.output: list[float] = []

    def change(self, slot: int, entry: _Entry | None) -> None:
        """A slot has a new member, report or extra, or nobody."""
        if slot == len(self.base):
            for column in (self.base, self.token, self.output):
                column.append(0.0)
        self._stale[slot] = entry

    def refresh(self) -> None:
        """Bring the columns up to date."""
        for slot, entry in self._stale.items():
            price = (
                _NOBODY
                if entry is None or entry.load.draining
                else self._pricing(entry.load, entry.extra, self._config)
            )
            self.base[slot], self.token[slot], self.output[slot] = price.base_s, price.token_s, price.output_s
        self._stale.clear()


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
        self._index = PrefixIndex(max_expected=max_expected)
        self._loads: list[MemberLoad | None] = []
        self._free: list[int] = []
        self._recurrent = False
        self._slots: dict[int, tuple[int, ...]] = {}
        self._arrivals = 0.0
        self._arrived_s = -inf

    @property
    def arrivals_per_s(self) -> float:
        """Requests that were sent to a member, on average over the last while."""
        return self._arrivals / _MEMORY_S / max(len(self._loads) - len(self._free), 1)

    def add(self, load: MemberLoad) -> int:
        """Take a member in; returns its slot."""
        slot = self._free.pop() if self._free else len(self._loads)
        if slot == len(self._loads):
            self._loads.append(load)
        self.update(slot, load, Extra())
        return slot

    def update(self, slot: int, load: MemberLoad, extra: Extra) -> None:
        """Price a member anew."""
        self._loads[slot] = load
        self._recurrent = load.total_state_slots > 0
        entry = _Entry(load=load, extra=extra)
        for prices in self._lists.values():
            prices.change(slot, entry)

    def leave(self, slot: int) -> None:
        """A member left."""
        self._loads[slot] = None
        self._free.append(slot)
        self._index.clear(slot)
        for prices in self._lists.values():
            prices.change(slot, None)

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
        load = self._loads[offer.slot]
        if load is not None and load.prefix_cache:
            new = prompt.hashes(self.block_size)[offer.cached_tokens // self.block_size :]
            self._index.expect(offer.slot, new, until_s)

    def best(self, part: Part, prompt: Prompt, now: float, exclude: frozenset[MemberId]) -> Offer | None:
        """The cheapest member for a part of a request, among equals one that the prompt's key picks; None: nobody."""
        prices, new = self._lists[part], prompt.num_tokens
        prices.refresh()
        output = min(prompt.max_output, self._config.output_tokens)
        costs = [
            base + new * token + output * one
            for base, token, one in zip(prices.base, prices.token, prices.output, strict=True)
        ]
        cached = self._subtract_cached(costs, prices.token, prompt, now)
        for slot, load in enumerate(self._loads) if exclude else ():
            if load is not None and load.member_id in exclude:
                costs[slot] = inf
        least = min(costs, default=inf)
        if least == inf:
            return None
        limit = least + self._config.tie_s
        equal = [slot for slot, cost in enumerate(costs) if cost <= limit]
        slot = equal[crc32(prompt.key.encode()) % len(equal)]
        load = self._loads[slot]
        assert load is not None, "a price without a member"
        held = cached.get(slot, 0)
        return Offer(slot=slot, member_id=load.member_id, cost_s=costs[slot], new_tokens=new - held, cached_tokens=held)

    def _subtract_cached(self, costs: list[float], token_s: list[float], prompt: Prompt, now: float) -> dict[int, int]:
        """Lower the costs of members that hold a part of the prompt -> tokens held by slot."""
        hashes = prompt.hashes(self.block_size)
        self._index.forget(now)
        depths = self._index.depths(hashes)
        if self._recurrent and depths:
            depths = self._index.state_depths(hashes, depths)
        cached: dict[int, int] = {}
        for depth, members in depths:
            tokens = depth * self.block_size
            slots = self._slots_of(members)
            for slot in slots:
                costs[slot] -= tokens * token_s[slot]
            cached.update(dict.fromkeys(slots, tokens))
        return cached

    def _slots_of(self, members: int) -> tuple[int, ...]:
        """The slots in a bit set; the few sets that hold common prefixes come up again and again."""
        slots = self._slots.get(members)
        if slots is None:
            if len(self._slots) >= _MAX_SETS:
                self._slots.clear()
            slots = tuple(slot for slot, digit in enumerate(reversed(f"{members:b}")) if digit == "1")
            self._slots[members] = slots
        return slots
