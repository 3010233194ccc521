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

BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds of each call, sorted."""

    hashing: list[float]
    deciding: list[float]
    reporting: list[float]


def make_load(index: int, role: Role, rng: random.Random) -> MemberLoad:
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


def make_router(members: int, roles: tuple[Role, ...], held: list[list[int]], share: int) -> Router:
    """Members that hold the given blocks, filled up to `share` blocks each with others."""
    rng = random.Random(2)
    router = Router()
    for index in range(members):
        load = make_load(index, roles[index % len(roles)], rng)
        router.update(load, 0.0)
        own = held[index] + [rng.getrandbits(64) for _ in range(share - len(held[index]))]
        router.take_events(load.member_id, CacheEvents(after=0, sequence=1, cleared=True, stored=tuple(own)))
    return router


def measure(members: int, prefixes: int, prompt_tokens: int, roles: tuple[Role, ...], decisions: int) -> Times:
    """All members hold the first half of every prompt; half of the prompts are held to the end by one member."""
    rng = random.Random(1)
    common = tuple(rng.randrange(150_000) for _ in range(prompt_tokens // 2))
    requests = make_requests(decisions, prompt_tokens, common, rng)
    prompts: list[Prompt] = []
    hashing = [_timed(lambda each=each: prompts.append(_hashed(each))) for each in requests]
    known = [prompt.hashes(BLOCK) for prompt in prompts[: decisions // 2]]
    held = [list({value for hashes in known[index::members] for value in hashes}) for index in range(members)]
    base = list(known[0][: len(common) // BLOCK])
    router = make_router(members, roles, [list({*base, *own}) for own in held], prefixes // members)
    rng.shuffle(prompts)
    deciding = [_timed(lambda at=at, each=each: router.route(each, at * 0.01)) for at, each in enumerate(prompts)]
    loads = router.loads
    reporting = [_timed(lambda load=load: router.update(load, 1e6)) for load in loads]
    return Times(hashing=sorted(hashing), deciding=sorted(deciding), reporting=sorted(reporting))


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
    shapes: dict[str, tuple[Role, ...]] = {"mixed": ("mixed",), "prefill + decode": ("prefill", "decode")}
    for name, roles in shapes.items():
        for prompt_tokens in (128, 1024, 16_384):
            times = measure(args.members, args.prefixes, prompt_tokens, roles, args.decisions)
            told = ", ".join(
                f"{what} {each[len(each) // 2] * 1e6:.0f} ({each[len(each) * 99 // 100] * 1e6:.0f})"
                for what, each in (("hash", times.hashing), ("decide", times.deciding), ("report", times.reporting))
            )
            print(f"{name:>17}, {prompt_tokens:5} tokens: {told}")


if __name__ == "__main__":
    main()
