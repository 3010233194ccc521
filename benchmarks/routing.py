"""Microseconds the router needs for one decision: python benchmarks/routing.py [--members 64] [--prefixes 100000]."""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from router.load import CacheEvents, MemberLoad
from router.prompt import Prompt, prompt_of
from router.request import MemberId, Request, RequestId, Role, SamplingParams
from router.router import Router
from router.step_time import StepTime

BLOCK = 16


# Decisions a second of one gateway, and between two reports of a member that is at work.
_RATE = 100
_REPORT_GAP_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of each call, sorted."""

    hashing: list[float]
    deciding: list[float]
    cold: list[float]
    """Decisions right behind the hashing of a long prompt and their own: the processor's caches hold nothing else."""
    reporting: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is measured."""

    members: int
    prefixes: int
    prompt_tokens: int
    roles: tuple[Role, ...]
    decisions: int
    recurrent: bool = False


def make_load(index: int, role: Role, rng: random.Random, *, recurrent: bool) -> MemberLoad:
    """A busy member."""
    return MemberLoad(
        member_id=MemberId(f"{role}-{index}"),
        role=role,
        waiting_tokens=rng.randrange(4000),
        waiting_requests=rng.randrange(4),
        running_requests=rng.randrange(60),
        context_tokens=rng.randrange(60_000),
        max_requests=64,
        free_blocks=rng.randrange(500, 4000),
        total_blocks=4096,
        block_size=BLOCK,
        step_time=StepTime(experts_s=0.004, expert_share=8 / 128),
        total_state_slots=512 if recurrent else 0,
        free_state_slots=400 if recurrent else 0,
    )


def make_requests(count: int, tokens: int, common: tuple[int, ...], rng: random.Random) -> list[Request]:
    """Random prompts of one length behind common ones."""
    return [
        Request(
            id=RequestId(f"r{rng.random()}"),
            prompt_ids=common + tuple(rng.randrange(150_000) for _ in range(tokens - len(common))),
            sampling=SamplingParams(max_tokens=64),
        )
        for _ in range(count)
    ]


def make_router(shape: Shape, held: list[list[int]]) -> Router:
    """Members that hold the given blocks, filled up with others; recurrent ones have a state behind every 16th."""
    rng = random.Random(2)
    router = Router()
    for index in range(shape.members):
        load = make_load(index, shape.roles[index % len(shape.roles)], rng, recurrent=shape.recurrent)
        router.update(load, 0.0)
        filling = shape.prefixes // shape.members - len(held[index])
        own = tuple(held[index] + [rng.getrandbits(64) for _ in range(filling)])
        states = own[15::16] if shape.recurrent else ()
        router.take_events(
            load.member_id, CacheEvents(after=0, sequence=1, cleared=True, stored=own, stored_states=states)
        )
    return router


def measure(shape: Shape) -> Times:
    """All members hold the first half of every prompt; half of the prompts are held to the end by one member.

    Members report between the decisions as often as they do at work, and so long a time passes that each decision
    forgets a prompt of before.
    """
    rng = random.Random(1)
    common = tuple(rng.randrange(150_000) for _ in range(shape.prompt_tokens // 2))
    requests = make_requests(shape.decisions, shape.prompt_tokens, common, rng)
    prompts: list[Prompt] = []
    hashing = [_timed(lambda each=each: prompts.append(_hashed(each))) for each in requests]
    known = [prompt.hashes(BLOCK) for prompt in prompts[: shape.decisions // 2]]
    base = known[0][: len(common) // BLOCK]
    own = [[value for hashes in known[index :: shape.members] for value in hashes] for index in range(shape.members)]
    router = make_router(shape, [list(dict.fromkeys((*base, *each))) for each in own])
    order = rng.sample(range(shape.decisions), shape.decisions)
    clock = _Clock(router)
    deciding = [clock.decide(prompts[index]) for index in order]
    long = make_requests(1, 16_384, (), rng)[0]
    cold = [clock.decide(_hashed_last(requests[index], long)) for index in order]
    return Times(hashing=sorted(hashing), deciding=sorted(deciding), cold=sorted(cold), reporting=sorted(clock.reports))


class _Clock:
    """Lets members report in turn, between the decisions of a busy gateway."""

    def __init__(self, router: Router) -> None:
        self.reports: list[float] = []
        self._router = router
        self._loads = router.loads
        self._now = 0.0
        self._next = 0
        self._due = 0.0

    def decide(self, prompt: Prompt) -> float:
        """Seconds of a decision, behind the reports of its time."""
        self._now += 1 / _RATE
        self._due += len(self._loads) / _REPORT_GAP_S / _RATE
        while self._due >= 1:
            load = self._loads[self._next]
            self.reports.append(_timed(lambda load=load: self._router.update(load, self._now)))
            self._next = (self._next + 1) % len(self._loads)
            self._due -= 1
        return _timed(lambda: self._router.route(prompt, self._now))


def _hashed_last(request: Request, long: Request) -> Prompt:
    """A prompt with its hashes, the processor's caches full of another's."""
    _hashed(long)
    return _hashed(request)


def _hashed(request: Request) -> Prompt:
    prompt = prompt_of(request)
    prompt.hashes(BLOCK)
    return prompt


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each pool shape and prompt length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=100_000, help="cached block hashes over all members")
    parser.add_argument("--decisions", type=int, default=1000)
    args = parser.parse_args()
    print(f"{args.members} members, {args.prefixes} cached prefixes, {args.decisions} decisions; median (p99), us")
    print("prompt tokens: hashing it, deciding, deciding right behind the hashing of 16384 tokens, taking a report")
    shapes: dict[str, tuple[tuple[Role, ...], bool]] = {
        "mixed": (("mixed",), False),
        "prefill + decode": (("prefill", "decode"), False),
        "mixed, recurrent": (("mixed",), True),
    }
    for name, (roles, recurrent) in shapes.items():
        for prompt_tokens in (128, 1024, 16_384):
            shape = Shape(
                members=args.members,
                prefixes=args.prefixes,
                prompt_tokens=prompt_tokens,
                roles=roles,
                decisions=args.decisions,
                recurrent=recurrent,
            )
            times = measure(shape)
            told = ", ".join(
                f"{what} {each[len(each) // 2] * 1e6:.0f} ({each[len(each) * 99 // 100] * 1e6:.0f})"
                for what, each in (
                    ("hash", times.hashing),
                    ("decide", times.deciding),
                    ("cold", times.cold),
                    ("report", times.reporting),
                )
            )
            print(f"{name:>17}, {prompt_tokens:5} tokens: {told}", flush=True)


if __name__ == "__main__":
    main()
