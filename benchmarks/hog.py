"""What a hog does to others' first tokens on a real member: `python -m benchmarks.hog --model DIR`.

Four tenants ask a gateway with one member of this process for half of what it can do, first alone, then beside a fifth
that asks for ten times all of it. Prints the others' times to first token of both runs, the ratio of their tails, what
processes computed beside the hog, and the same of the simulation, whose members have their cores for themselves.
With `--ray` the member is one of a local Ray cluster and clients ask its gateway over HTTP, the hog's from a process of
their own, at low priority unless `--same-priority`: a hog's clients have cores of their own somewhere, and what is
measured is what the hog does to the server. `hog_late_ms` tells how late they sent, in the mean and at most. With
`--long` the hog sends fewer and longer prompts that are as much to compute, and what it costs to send and to refuse
them counts less.
"""

import argparse
import asyncio
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ray_http import HttpFleet, cpu_s, serving
from benchmarks.replay import PROMPTS, Arrival, Seen, as_trace, calibrate, capacity, make_arrivals, make_member, replay
from cluster.config import Dtype
from deploy.bench_engine import DTYPES
from router.admission import AdmissionConfig
from router.simulated_fleet import Fleet
from router.simulated_member import MemberSpec
from router.simulation import percentile, simulate_tenants
from tests.support.members import dispatching

_OTHERS = "abcd"
_LONG = (900, 960)
"""Tokens of the hog's prompts."""
_HOG_NICE = 19
_REST_S = 20.0
"""For the last requests to end."""


def _times(seen: list[Seen]) -> list[float]:
    return sorted(each.ttft_s for each in seen if each.tenant != "hog" and not each.refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of a fleet."""

    share: float
    """Of its capacity, by the others together."""
    overload: float
    """Times its capacity, by the hog."""
    length_s: float
    hog_prompts: tuple[int, int]
    """Shortest and longest, in tokens."""

    def arrivals(self, spec: MemberSpec, members: int) -> tuple[list[Arrival], list[Arrival]]:
        """The others' requests and the hog's, of so many members like that."""
        rng = random.Random(1)
        each = self.share * members * capacity(spec) / len(_OTHERS)
        others = [arrival for name in _OTHERS for arrival in make_arrivals(rng, name, each, self.length_s)]
        rate = self.overload * members * capacity(spec, self.hog_prompts)
        return others, make_arrivals(rng, "hog", rate, self.length_s, self.hog_prompts)


async def measure(model: Path, dtype: Dtype, demand: Demand) -> dict[str, object]:
    """Figures of both runs in this process."""
    async with dispatching([make_member(model, dtype)]) as dispatcher:
        spec = await calibrate(dispatcher)
        others, hog = demand.arrivals(spec, 1)
        alone = await replay(dispatcher, others)
        beside = await replay(dispatcher, others + hog)
    return _figures(spec, 1, (others, hog), alone, beside)


async def measure_ray(fleet: HttpFleet, demand: Demand, hog_nice: int) -> dict[str, object]:
    """Figures of both runs through HTTP."""
    spec = await fleet.calibrate()
    others, hog = demand.arrivals(spec, fleet.members)
    alone = await fleet.replay(others, limit_s=demand.length_s + _REST_S)
    before = cpu_s()
    runs = [
        fleet.replay(others, limit_s=demand.length_s + _REST_S),
        fleet.replay(hog, limit_s=demand.length_s, nice=hog_nice),
    ]
    beside = [each for run in await asyncio.gather(*runs) for each in run]
    late_ms = [1e3 * each.late_s for each in beside if each.tenant == "hog"]
    used = {name: round(value - before[name], 1) for name, value in cpu_s().items()}
    return _figures(spec, fleet.members, (others, hog), alone, beside) | {
        "hog_late_ms": [round(statistics.fmean(late_ms), 1), round(max(late_ms), 1)],
        "cpu_s": used,
    }


def _figures(
    spec: MemberSpec, members: int, sent: tuple[list[Arrival], list[Arrival]], alone: list[Seen], beside: list[Seen]
) -> dict[str, object]:
    others, hog = sent
    times = [_times(alone), _times(beside), *_simulated(spec, members, others, hog)]
    tails = [percentile(each, 0.99) for each in times]
    return {
        "members": members,
        "capacity_per_s": round(members * capacity(spec), 1),
        "others": len(others),
        "others_refused": sum(each.refused for each in beside if each.tenant != "hog"),
        "hog": len(hog),
        "hog_tokens": sum(len(each.prompt) for each in hog),
        "hog_served": sum(not each.refused for each in beside if each.tenant == "hog"),
        "others_p50_ms": [round(1e3 * percentile(each, 0.5), 1) for each in times[:2]],
        "others_p99_ms": [round(1e3 * tail, 1) for tail in tails[:2]],
        "p99_ratio": round(tails[1] / tails[0], 2),
        "simulated_p50_ms": [round(1e3 * percentile(each, 0.5), 1) for each in times[2:]],
        "simulated_p99_ms": [round(1e3 * tail, 1) for tail in tails[2:]],
    }


def _simulated(spec: MemberSpec, members: int, others: list[Arrival], hog: list[Arrival]) -> list[list[float]]:
    """The others' times to first token in simulation, alone and beside the hog."""
    fleet = Fleet(members=members, spec=spec, admission=AdmissionConfig())
    found = []
    for arrivals in (others, others + hog):
        times = simulate_tenants(as_trace(sorted(arrivals, key=lambda each: each.at_s)), fleet, "cost")
        found.append(sorted(value for name in _OTHERS for value in times[name]))
    return found


def main() -> None:
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--share", type=float, default=0.5, help="of the member's capacity that the others ask for")
    parser.add_argument("--overload", type=float, default=10.0, help="times its capacity that the hog asks for")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--long", action="store_true", help="few long prompts of the hog in place of many short ones")
    parser.add_argument("--ray", action="store_true", help="on a local Ray cluster, over HTTP")
    parser.add_argument("--members", type=int, default=1, help="of the Ray cluster")
    parser.add_argument("--same-priority", action="store_true", help="the hog's clients are scheduled as all others")
    given = parser.parse_args()
    demand = Demand(
        share=given.share,
        overload=given.overload,
        length_s=given.seconds,
        hog_prompts=_LONG if given.long else PROMPTS,
    )
    dtype = DTYPES[given.dtype]
    if given.ray:
        with serving(given.model.resolve(), dtype, given.members, [*_OTHERS, "hog"]) as fleet:
            print(json.dumps(asyncio.run(measure_ray(fleet, demand, 0 if given.same_priority else _HOG_NICE))))
    else:
        print(json.dumps(asyncio.run(measure(given.model, dtype, demand))))


if __name__ == "__main__":
    main()
