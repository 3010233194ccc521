"""The same load on a real member and in simulation: `python -m benchmarks.simulation_validation --model DIR`.

A gateway's dispatcher, admission and router serve Poisson arrivals on one member of this process, at one load after the
other; the simulation serves the same arrivals with the step times that the member had measured before them: with few
and with many requests at once, and for a while at that load (`--before`), since clients, gateway and members share
cores. Prints both, and the errors.
"""

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.ray_http import HttpFleet, serving
from benchmarks.replay import Arrival, Seen, as_trace, calibrate, capacity, make_arrivals, make_member, replay, way_s
from cluster.config import Dtype
from deploy.bench_engine import DTYPES
from router.admission import AdmissionConfig
from router.simulated_fleet import Fleet
from router.simulated_member import MemberSpec
from router.simulation import Result, percentile, simulate
from tests.support.members import dispatching

_FIGURES = ("mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "mean_itl_s", "p50_itl_s", "p99_itl_s")


async def validate(
    model: Path, dtype: Dtype, loads: Sequence[float], length_s: float, before_s: float
) -> AsyncGenerator[dict[str, object]]:
    """Both runs' figures at each load, in milliseconds. Nothing of a run goes into its simulation but its arrivals.

    The real one is a member of this process.
    """
    member = make_member(model, dtype)
    async with dispatching([member]) as dispatcher:
        spec = await calibrate(dispatcher)
        spec = replace(spec, way_s=await way_s(dispatcher, member.engine))
        rates = [load * capacity(spec) for load in loads]
        for number, (load, rate) in enumerate(zip(loads, rates, strict=True), 1):
            await replay(dispatcher, _earlier(number, rate, before_s))
            spec = replace(spec, step_time=member.engine.load().step_time)
            arrivals = make_arrivals(random.Random(number), "", rate, length_s)
            yield {"utilisation": load} | _line(spec, 1, arrivals, await replay(dispatcher, arrivals))


def _earlier(number: int, rate: float, length_s: float) -> list[Arrival]:
    """Other requests at the same load, by which a member learns what its steps take beside them."""
    return make_arrivals(random.Random(1000 + number), "", rate, length_s) if length_s else []


async def validate_ray(
    fleet: HttpFleet, loads: Sequence[float], length_s: float, before_s: float
) -> AsyncGenerator[dict[str, object]]:
    """As `validate`, of members on a local Ray cluster whose gateway is asked over HTTP."""
    spec = await fleet.calibrate()
    rates = [load * fleet.members * capacity(spec) for load in loads]
    for number, (load, rate) in enumerate(zip(loads, rates, strict=True), 1):
        await fleet.replay(_earlier(number, rate, before_s), limit_s=before_s + 30.0)
        spec = replace(spec, step_time=(await fleet.measured()).step_time)
        arrivals = make_arrivals(random.Random(number), "", rate, length_s)
        seen = await fleet.replay(arrivals, limit_s=length_s + 30.0)
        yield {"utilisation": load, "members": fleet.members} | _line(spec, fleet.members, arrivals, seen)


def _line(spec: MemberSpec, members: int, arrivals: Sequence[Arrival], seen: list[Seen]) -> dict[str, object]:
    fleet = Fleet(members=members, spec=spec, admission=AdmissionConfig())
    found = simulate(as_trace(arrivals), fleet, "cost")
    return {"way_ms": round(1e3 * spec.way_s, 2), **_report(len(arrivals), spec, _figures(seen), found)}


def _figures(seen: list[Seen]) -> dict[str, float]:
    ttfts = sorted(each.ttft_s for each in seen if not each.refused)
    gaps = sorted(gap for each in seen for gap in each.gaps_s)
    figures = (
        *(statistics.fmean(ttfts), percentile(ttfts, 0.5), percentile(ttfts, 0.99)),
        *(statistics.fmean(gaps), percentile(gaps, 0.5), percentile(gaps, 0.99)),
    )
    return dict(zip(_FIGURES, figures, strict=True))


def _report(requests: int, spec: MemberSpec, real: dict[str, float], found: Result) -> dict[str, object]:
    line: dict[str, object] = {"requests": requests, "step_time": asdict(spec.step_time)}
    for name in _FIGURES:
        simulated = float(getattr(found, name))
        error = f"{simulated / real[name] - 1:+.0%}"
        line[name.removesuffix("_s")] = {
            "real_ms": round(1e3 * real[name], 2),
            "simulated_ms": round(1e3 * simulated, 2),
            "error": error,
        }
    return line


def main() -> None:
    """Run and print a JSON line for each load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--utilisation", type=float, nargs="+", default=[0.6], help="shares of the member's capacity that are asked"
    )
    parser.add_argument("--seconds", type=float, default=25.0, help="of each load")
    parser.add_argument("--before", type=float, default=8.0, help="seconds at each load before it counts")
    parser.add_argument("--ray", action="store_true", help="members of a local Ray cluster, asked over HTTP")
    parser.add_argument("--members", type=int, default=1, help="of the Ray cluster")
    given = parser.parse_args()
    dtype = DTYPES[given.dtype]
    if given.ray:
        with serving(given.model.resolve(), dtype, given.members, [""]) as fleet:
            asyncio.run(_print(validate_ray(fleet, given.utilisation, given.seconds, given.before)))
    else:
        asyncio.run(_print(validate(given.model, dtype, given.utilisation, given.seconds, given.before)))


async def _print(found: AsyncGenerator[dict[str, object]]) -> None:
    async with aclosing(found) as lines:
        async for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
