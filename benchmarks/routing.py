"""Microseconds the router needs for one decision: python benchmarks/routing.py [--members 64] [--prefixes 100000]."""

import argparse
import random
import time

from router.load import MemberLoad
from router.prefix import block_hashes
from router.request import MemberId, Request, RequestId, Role, SamplingParams
from router.router import Router

BLOCK = 16


def make_load(index: int, role: Role, digest: frozenset[int], rng: random.Random) -> MemberLoad:
    """A busy member that holds the given prefixes."""
    return MemberLoad(
        member_id=MemberId(f"{role}-{index}"),
        role=role,
        waiting_tokens=rng.randrange(4000),
        running_requests=rng.randrange(64),
        max_requests=64,
        free_blocks=rng.randrange(500, 4000),
        total_blocks=4096,
        block_size=BLOCK,
        prefix_digest=digest,
    )


def make_prompts(count: int, tokens: int, rng: random.Random) -> list[tuple[int, ...]]:
    """Random prompts of one length."""
    return [tuple(rng.randrange(150_000) for _ in range(tokens)) for _ in range(count)]


def measure(members: int, prefixes: int, prompt_tokens: int, roles: tuple[Role, ...], decisions: int) -> list[float]:
    """Seconds of each decision; half of the requests have a prefix that one member holds."""
    rng = random.Random(1)
    prompts = make_prompts(decisions // 2, prompt_tokens, rng)
    known = [block_hashes(prompt, BLOCK) for prompt in prompts]
    share = prefixes // members
    router = Router()
    for index in range(members):
        held = [value for hashes in known[index::members] for value in hashes]
        held += [rng.getrandbits(64) for _ in range(share - len(held))]
        router.update(make_load(index, roles[index % len(roles)], frozenset(held), rng))
    prompts += make_prompts(decisions - len(prompts), prompt_tokens, rng)
    rng.shuffle(prompts)
    seconds = []
    for number, prompt in enumerate(prompts):
        request = Request(id=RequestId(f"r{number}"), prompt_ids=prompt, sampling=SamplingParams(max_tokens=64))
        start = time.perf_counter()
        router.route(request, number * 0.01)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def main() -> None:
    """Print a line for each pool shape and prompt length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--prefixes", type=int, default=100_000, help="cached block hashes over all members")
    parser.add_argument("--decisions", type=int, default=1000)
    args = parser.parse_args()
    print(f"{args.members} members, {args.prefixes} cached prefixes, {args.decisions} decisions")
    shapes: dict[str, tuple[Role, ...]] = {"mixed": ("mixed",), "prefill + decode": ("prefill", "decode")}
    for name, roles in shapes.items():
        for prompt_tokens in (128, 1024):
            seconds = measure(args.members, args.prefixes, prompt_tokens, roles, args.decisions)
            middle, late = seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100]
            print(f"{name:>17}, {prompt_tokens:5} tokens: median {middle * 1e6:6.0f} us, p99 {late * 1e6:6.0f} us")


if __name__ == "__main__":
    main()
