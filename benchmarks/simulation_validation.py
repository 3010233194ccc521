"""One load on a real member and in simulation: `python -m benchmarks.simulation_validation --model DIR`.

A gateway's dispatcher, admission and router serve Poisson arrivals on one member of this process; the simulation then
serves the same arrivals with the step times that the member had measured before. Prints both, and the errors.
"""

import argparse
import asyncio
import json
import random
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmarks.replay import Seen, as_trace, calibrate, capacity, make_arrivals, make_member, replay
from cluster.config import Dtype
from deploy.bench_engine import DTYPES
from router.admission import AdmissionConfig
from router.simulated_member import MemberSpec
from router.simulation import Fleet, Result, percentile, simulate
from tests.support.members import dispatching

_FIGURES = ("mean_ttft_s", "p50_ttft_s", "p99_ttft_s", "mean_itl_s", "p50_itl_s", "p99_itl_s")


async def validate(model: Path, dtype: Dtype, utilisation: float, length_s: float) -> dict[str, object]:
    """Both runs' figures, in milliseconds."""
    async with dispatching([make_member(model, dtype)]) as dispatcher:
        spec = await calibrate(dispatcher)
        arrivals = make_arrivals(random.Random(1), "", utilisation * capacity(spec), length_s)
        real = _figures(await replay(dispatcher, arrivals))
    found = simulate(as_trace(arrivals), Fleet(members=1, spec=spec, admission=AdmissionConfig()), "cost")
    return _report(len(arrivals), spec, real, found)


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
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--utilisation", type=float, default=0.6, help="share of the member's capacity that is asked")
    parser.add_argument("--seconds", type=float, default=25.0)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(validate(given.model, DTYPES[given.dtype], given.utilisation, given.seconds))))


if __name__ == "__main__":
    main()
