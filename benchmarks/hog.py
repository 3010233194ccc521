"""What a hog does to others' first tokens on a real member: `python -m benchmarks.hog --model DIR`.

Four tenants ask a gateway with one member of this process for half of what it can do, first alone, then beside a fifth
that asks for ten times all of it. Prints the others' times to first token of both runs, and the ratio of their tails.
"""

import argparse
import asyncio
import json
import random
from pathlib import Path

from benchmarks.replay import Seen, calibrate, capacity, make_arrivals, make_member, replay
from cluster.config import Dtype
from deploy.bench_engine import DTYPES
from router.simulation import percentile
from tests.support.members import dispatching

_OTHERS = "abcd"


def _times(seen: list[Seen]) -> list[float]:
    return sorted(each.ttft_s for each in seen if each.tenant != "hog" and not each.refused)


async def measure(model: Path, dtype: Dtype, share: float, overload: float, length_s: float) -> dict[str, object]:
    """Figures of both runs."""
    async with dispatching([make_member(model, dtype)]) as dispatcher:
        rate = capacity(await calibrate(dispatcher))
        rng = random.Random(1)
        others = [each for name in _OTHERS for each in make_arrivals(rng, name, share * rate / len(_OTHERS), length_s)]
        hog = make_arrivals(rng, "hog", overload * rate, length_s)
        alone = await replay(dispatcher, others)
        beside = await replay(dispatcher, others + hog)
    tails = [percentile(_times(seen), 0.99) for seen in (alone, beside)]
    return {
        "capacity_per_s": round(rate, 1),
        "others": len(others),
        "others_refused": sum(each.refused for each in beside if each.tenant != "hog"),
        "hog": len(hog),
        "hog_served": sum(not each.refused for each in beside if each.tenant == "hog"),
        "others_p50_ms": [round(1e3 * percentile(_times(seen), 0.5), 1) for seen in (alone, beside)],
        "others_p99_ms": [round(1e3 * tail, 1) for tail in tails],
        "p99_ratio": round(tails[1] / tails[0], 2),
    }


def main() -> None:
    """Run and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--share", type=float, default=0.5, help="of the member's capacity that the others ask for")
    parser.add_argument("--overload", type=float, default=10.0, help="times its capacity that the hog asks for")
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    print(
        json.dumps(asyncio.run(measure(given.model, DTYPES[given.dtype], given.share, given.overload, given.seconds)))
    )


if __name__ == "__main__":
    main()
