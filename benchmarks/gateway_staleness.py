"""How old is what each of several gateways knows when it decides, and what that costs.

`python -m benchmarks.gateway_staleness --model DIR`: real members in this process, gateways with streams of their own,
under Poisson arrivals. For each number of gateways, over all decisions and members: the age of the load report that the
gateway has of a member at work, how long it lacks a later one, or a change of the member's prefix cache (0: it knows
all), and by how much gateways' reports differ in age; milliseconds, to the one by which members are looked at.

`python -m benchmarks.gateway_staleness --trace FILE`: the simulation with so many gateways, of a fleet at 80%. Arrivals
that the trace rounds to one moment are spread evenly up to the next: no gateway could know of the others' in no time.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Final

from typing_extensions import override

from benchmarks.replay import calibrate, capacity, make_arrivals, make_member, replay
from cluster.config import Dtype
from cluster.dispatcher import Dispatcher
from deploy.bench_engine import DTYPES
from router.admission import Admission
from router.load import CacheEvents, MemberLoad
from router.prompt import Prompt
from router.request import MemberId
from router.router import Route, Router
from router.simulate import SimulateOptions, load_fleet, load_trace
from router.simulated_fleet import Fleet
from router.simulation import percentile, simulate, split_by_room
from router.trace import TraceRequest
from tests.support.fleet import TOKEN, until
from tests.support.members import EngineMember, gateway

_LOOK_S: Final = 0.001


class Moments:
    """When members made each load report, and each change of their prefix caches."""

    def __init__(self, members: Sequence[EngineMember]) -> None:
        self._members = members
        self.working: dict[MemberId, bool] = {}
        self.loads: dict[MemberId, dict[int, float]] = {member.member_id: {} for member in members}
        self.events: dict[MemberId, dict[int, float]] = {member.member_id: {} for member in members}

    async def watch(self) -> None:
        """Look at all members until cancelled."""
        known = dict.fromkeys(self.events, 0)
        while True:
            now = time.time()
            for member in self._members:
                load = member.engine.load()
                self.working[member.member_id] = load.running_requests > 0
                self.loads[member.member_id].setdefault(load.sequence, now)
                for event in member.engine.cache_events(known[member.member_id]):
                    self.events[member.member_id].setdefault(event.sequence, now)
                    known[member.member_id] = event.sequence
            await asyncio.sleep(_LOOK_S)


class WatchedRouter(Router):
    """Notes at each decision how old is what it decides on."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self._moments = moments
        self.others: list[WatchedRouter] = []
        self.load_sequence: dict[MemberId, int] = {}
        self.cache_sequence: dict[MemberId, int] = {}
        self.ages: dict[str, list[float]] = defaultdict(list)

    @override
    def update(self, load: MemberLoad, now: float) -> None:
        """As the router, noting which report it was."""
        self.load_sequence[load.member_id] = load.sequence
        super().update(load, now)

    @override
    def take_events(self, member_id: MemberId, events: CacheEvents) -> bool:
        """As the router, noting up to where it knows the cache."""
        taken = super().take_events(member_id, events)
        if taken:
            self.cache_sequence[member_id] = events.sequence
        return taken

    @override
    def route(self, prompt: Prompt, now: float, *, exclude: frozenset[MemberId] = frozenset()) -> Route:
        """As the router, noting how old its knowledge is."""
        for member_id in self.load_sequence:
            if self._moments.working[member_id]:
                self.ages["load_age"].append(now - self._made(member_id, now))
            later = self._moments.loads[member_id].get(self.load_sequence[member_id] + 1, now)
            self.ages["load_lacking"].append(now - later)
            missing = self._moments.events[member_id].get(self.cache_sequence.get(member_id, 0) + 1, now)
            self.ages["cache_lacking"].append(now - missing)
            made = [each._made(member_id, now) for each in (self, *self.others)]
            self.ages["difference"].append(max(made) - min(made))
        return super().route(prompt, now, exclude=exclude)

    def _made(self, member_id: MemberId, now: float) -> float:
        """When the report was made that it has of a member."""
        return self._moments.loads[member_id].get(self.load_sequence[member_id], now)


@asynccontextmanager
async def _gateways(
    members: Sequence[EngineMember], count: int
) -> AsyncIterator[list[tuple[Dispatcher, WatchedRouter]]]:
    infos = [member.info for member in members]
    moments = Moments(members)
    watching = asyncio.create_task(moments.watch())
    routers = [WatchedRouter(moments) for _ in range(count)]
    dispatchers = [Dispatcher(router, Admission(), TOKEN) for router in routers]
    for router in routers:
        router.others = [each for each in routers if each is not router]
    try:
        for dispatcher in dispatchers:
            dispatcher.update_members(infos)
        await until(lambda: all(len(dispatcher.loads()) == len(infos) for dispatcher in dispatchers))
        yield list(zip(dispatchers, routers, strict=True))
    finally:
        watching.cancel()
        for dispatcher in dispatchers:
            await dispatcher.close()


async def measure(
    model: Path, dtype: Dtype, num_members: int, counts: Sequence[int], share: float, length_s: float
) -> AsyncIterator[dict[str, object]]:
    """Figures of each number of gateways."""
    members = [make_member(model, dtype, f"m{number}") for number in range(num_members)]
    try:
        for member in members:
            await member.start()
        rate = 0.0
        for member in members:
            async with gateway([member.info]) as alone:
                rate += share * capacity(await calibrate(alone))
        for count in counts:
            async with _gateways(members, count) as gateways:
                yield {"gateways": count} | await _run(gateways, rate / count, length_s)
    finally:
        for member in members:
            await member.stop()


async def _run(gateways: Sequence[tuple[Dispatcher, WatchedRouter]], rate: float, length_s: float) -> dict[str, object]:
    # All gateways' requests begin with the same few prompts, so that each needs what others' requests left in caches.
    loads = [make_arrivals(random.Random(1), "", rate, length_s) for _ in gateways]
    rng = random.Random(2)
    shifted = [
        [replace(each, at_s=each.at_s + rng.uniform(0, 1 / rate), prompt=(*each.prompt[:-1], number)) for each in load]
        for number, load in enumerate(loads)
    ]
    runs = [replay(dispatcher, load) for (dispatcher, _), load in zip(gateways, shifted, strict=True)]
    seen = [each for run in await asyncio.gather(*runs) for each in run]
    ttfts = sorted(each.ttft_s for each in seen if not each.refused)
    found: dict[str, object] = {
        "requests": len(seen),
        "refused": sum(each.refused for each in seen),
        "mean_ttft_ms": round(1e3 * statistics.fmean(ttfts), 1),
    }
    for name in ("load_age", "load_lacking", "cache_lacking", "difference"):
        ages = sorted(age for _, router in gateways for age in router.ages[name])
        found[f"{name}_ms"] = {
            "p50": round(1e3 * percentile(ages, 0.5), 1),
            "p99": round(1e3 * percentile(ages, 0.99), 1),
            "most": round(1e3 * ages[-1], 1),
        }
    return found


def spread(trace: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Arrivals of one moment, evenly up to the next moment."""
    groups = [list(group) for _, group in groupby(trace, key=lambda each: each.arrival_s)]
    found: list[TraceRequest] = []
    for group, following in zip(groups, [*groups[1:], groups[-1]], strict=True):
        gap_s = (following[0].arrival_s - group[0].arrival_s) / len(group)
        found += [replace(each, arrival_s=each.arrival_s + index * gap_s) for index, each in enumerate(group)]
    return found


def simulated(options: SimulateOptions, counts: Sequence[int]) -> None:
    """Print a line for each fleet size and number of gateways."""
    recorded, _ = split_by_room(spread(load_trace(options)), options.spec)
    for members in options.members:
        trace, _, _ = load_fleet(recorded, members, options)
        for count in counts:
            found = simulate(trace, Fleet(members=members, spec=options.spec, gateways=count), "cost")
            hits = found.hit_rate / found.hit_bound
            line = {"members": members, "gateways": count, "requests": found.requests, "hits_of_bound": round(hits, 3)}
            line |= {name: round(getattr(found, name), 2) for name in ("mean_ttft_s", "p99_ttft_s", "goodput")}
            print(json.dumps(line), flush=True)


async def _print(given: argparse.Namespace) -> None:
    lines = measure(given.model, DTYPES[given.dtype], given.members[0], given.gateways, given.share, given.seconds)
    async for line in lines:
        print(json.dumps(line), flush=True)


def main() -> None:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--trace", type=Path)
    parser.add_argument("--members", type=int, nargs="+", default=[2])
    parser.add_argument("--gateways", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--share", type=float, default=0.5, help="of what the members can do, asked by all together")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each real run")
    parser.add_argument("--requests", type=int, default=12_000, help="of each simulated run")
    given = parser.parse_args()
    if given.trace is not None:
        simulated(
            SimulateOptions(trace=given.trace, members=tuple(given.members), requests=given.requests), given.gateways
        )
    else:
        asyncio.run(_print(given))


if __name__ == "__main__":
    main()
