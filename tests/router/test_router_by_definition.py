"""The router's decisions are those of the cost model as it is written down, member by member and block by block."""

import random
from dataclasses import dataclass, field, replace
from zlib import crc32

import pytest

from router.load import CacheEvents, MemberLoad
from router.policy import Extra, PolicyConfig, Price, decode_price, mixed_price, prefill_price
from router.pool import Part
from router.prompt import Prompt
from router.request import MemberId, Role
from router.router import Route, Router, RouterConfig
from router.step_time import StepTime

# Others' delay depends on when a member was priced last; everything else only on what is known now.
POLICY = PolicyConfig(others_weight=0.0, work_weight=1.0, tie_s=0.002, transfer_bytes_per_s=1e6)
CONFIG = RouterConfig(policy=POLICY, recent_s=1.0, expected_s=3.0)
BLOCK = 16
PRICES = {"prefill": prefill_price, "decode": decode_price, "both": mixed_price}


@dataclass(slots=True, kw_only=True)
class Member:
    """What is known of one member, in the plainest form."""

    load: MemberLoad
    reports: int = 0
    kv: set[int] = field(default_factory=set)
    states: set[int] = field(default_factory=set)
    routed: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Until when, until which report, tokens, held tokens."""
    expected: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)

    def price(self, part: Part, now: float) -> Price:
        counted = [each for each in self.routed if each[0] > now and each[1] > self.reports]
        extra = Extra(
            requests=len(counted), tokens=sum(each[2] for each in counted), held_tokens=sum(each[3] for each in counted)
        )
        return PRICES[part](self.load, extra, POLICY)

    def cached(self, hashes: tuple[int, ...], now: float) -> int:
        """Blocks behind which it can go on."""
        sent = [each for until_s, each in self.expected if until_s > now]

        def agreed(other: tuple[int, ...]) -> int:
            return sum(1 for one, two in zip(hashes, other, strict=False) if one == two)

        depth = max([sum(value in self.kv for value in hashes), *map(agreed, sent)])
        if not self.load.total_state_slots:
            return depth
        usable = [index + 1 for index in range(depth) if hashes[index] in self.states]
        usable += [len(each) for each in sent if agreed(each) == len(each) <= depth]
        return max(usable, default=0)


class Definition:
    """Routes by looking at every member."""

    def __init__(self) -> None:
        self.members: dict[MemberId, Member] = {}

    def best(self, role: Role, part: Part, prompt: Prompt, now: float) -> tuple[float, MemberId, int] | None:
        hashes = tuple(prompt.hashes(BLOCK))
        output = min(prompt.max_output, POLICY.output_tokens)
        offers = []
        for member_id, member in self.members.items():
            if member.load.role == role and not member.load.draining:
                price, held = member.price(part, now), BLOCK * member.cached(hashes, now)
                cost = price.base_s + (prompt.num_tokens - held) * price.token_s + output * price.output_s
                offers.append((cost, member_id, held))
        equal = [offer for offer in offers if offer[0] <= min(offers)[0] + POLICY.tie_s]
        return equal[crc32(prompt.key.encode()) % len(equal)] if equal else None

    def route(self, prompt: Prompt, now: float) -> Route:
        first = self.best("prefill", "prefill", prompt, now)
        second = self.best("decode", "decode", prompt, now) or self.best("mixed", "decode", prompt, now)
        alone = self.best("mixed", "both", prompt, now)
        if alone is None and first is None:
            alone = self.best("decode", "both", prompt, now)
        if first and second and (alone is None or first[0] + second[0] <= alone[0]):
            self.note(first, prompt, now)
            self.note(second, prompt, now)
            return Route(prefill=first[1], decode=second[1], cached_tokens=first[2], cost_s=first[0] + second[0])
        assert alone is not None
        self.note(alone, prompt, now)
        return Route(prefill=None, decode=alone[1], cached_tokens=alone[2], cost_s=alone[0])

    def note(self, offer: tuple[float, MemberId, int], prompt: Prompt, now: float) -> None:
        member = self.members[offer[1]]
        output = 0 if member.load.role == "prefill" else int(min(prompt.max_output, POLICY.output_tokens))
        held = prompt.num_tokens + output
        member.routed.append((now + CONFIG.recent_s, member.reports + 2, prompt.num_tokens - offer[2], held))
        member.expected.append((now + CONFIG.expected_s, tuple(prompt.hashes(BLOCK))))


def make_load(rng: random.Random, name: str, role: Role, slots: int) -> MemberLoad:
    return MemberLoad(
        member_id=MemberId(name),
        role=role,
        waiting_requests=rng.randrange(4),
        waiting_tokens=rng.choice((0, rng.randrange(600))),
        running_requests=rng.randrange(9),
        context_tokens=rng.randrange(4000),
        max_requests=12,
        step_tokens=256,
        step_time=StepTime(context_token_s=rng.choice((0.0, 1e-6))),
        free_blocks=rng.randrange(200),
        total_blocks=200,
        block_size=BLOCK,
        token_bytes=100,
        state_bytes=1000,
        free_state_slots=rng.randrange(1, slots) if slots else 0,
        total_state_slots=slots,
        draining=rng.random() < 0.05,
    )


def make_prompt(rng: random.Random, number: int, known: list[tuple[int, ...]]) -> Prompt:
    """Goes on with an earlier one, from any of its blocks, or with none."""
    begin = rng.choice(known)
    hashes = begin[: rng.randrange(len(begin) + 1)] + tuple(rng.getrandbits(64) for _ in range(rng.randrange(9)))
    known.append(hashes or begin)
    tokens = BLOCK * len(hashes) + 1 + rng.randrange(BLOCK)
    return Prompt(f"r{number}", num_tokens=tokens, max_output=rng.choice((8, 1000)), hashes={BLOCK: hashes})


def tell(rng: random.Random, router: Router, member: Member, sequence: int, known: list[tuple[int, ...]]) -> None:
    """The member's cache holds the beginnings of some prompts from now on."""
    chosen = [each[: rng.randrange(len(each) + 1)] for each in rng.sample(known, min(len(known), 5))]
    member.kv = {value for each in chosen for value in each}
    member.states = {value for value in member.kv if rng.random() < 0.2}
    member.expected.clear()
    stored, states = tuple(member.kv), tuple(member.states)
    events = CacheEvents(after=0, sequence=sequence, cleared=True, stored=stored, stored_states=states)
    assert router.take_events(member.load.member_id, events)


@pytest.mark.parametrize("roles", [("mixed",), ("prefill", "decode"), ("prefill", "decode", "mixed"), ("decode",)])
@pytest.mark.parametrize("slots", [0, 16])
def test_every_route_is_the_one_that_the_cost_model_gives(roles: tuple[Role, ...], slots: int) -> None:
    rng = random.Random(slots)
    for _ in range(12):
        router, definition = Router(CONFIG), Definition()
        for index in range(9):
            load = replace(make_load(rng, f"m{index}", roles[index % len(roles)], slots), draining=False)
            router.update(load, 0.0)
            definition.members[load.member_id] = Member(load=load)
        known: list[tuple[int, ...]] = [tuple(range(20))]
        now = 0.0
        for number in range(60):
            now += rng.expovariate(8.0)
            member = rng.choice(list(definition.members.values()))
            if rng.random() < 0.4:
                load = make_load(rng, member.load.member_id, member.load.role, slots)
                first = next(each for each in definition.members.values() if each.load.role == load.role)
                member.load = replace(load, draining=load.draining and member is not first)
                member.reports += 1
                router.update(member.load, now)
            if rng.random() < 0.2:
                tell(rng, router, member, number, known)
            prompt = make_prompt(rng, number, known)
            route, expected = router.route(prompt, now), definition.route(prompt, now)
            assert replace(route, cost_s=0.0) == replace(expected, cost_s=0.0), f"request {number}: {expected}"
            assert route.cost_s == pytest.approx(expected.cost_s)
