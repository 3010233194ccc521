"""A fleet on a local Ray cluster behind its HTTP gateway, for measurements: started, calibrated, and ended."""

import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil

from benchmarks.http_clients import replay_http
from benchmarks.replay import PROMPTS, ROWS, STEP_TOKENS, Arrival, Seen, make_arrivals, spec_of
from cluster.config import Dtype
from router.simulated_member import MemberSpec
from router.step_time import StepTime
from tests.support.ray_fleet import RayFleet

_REPORTED_S = 2.0
"""By then a member's load is in the directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpFleet:
    """A fleet that is up, and the keys of those who may ask."""

    fleet: RayFleet
    members: int
    keys: dict[str, str]

    @property
    def url(self) -> str:
        """Of its gateway."""
        return f"http://127.0.0.1:{self.fleet.http_port}"

    async def replay(self, arrivals: Sequence[Arrival], *, limit_s: float, nice: int = 0) -> list[Seen]:
        """Let a process of clients send these."""
        return await replay_http(self.url, "m", arrivals, self.keys, limit_s=limit_s, nice=nice)

    async def calibrate(self) -> MemberSpec:
        """Let members measure their steps, with few requests at once and with many; then a request's way to them."""
        requests = make_arrivals(random.Random(7), next(iter(self.keys)), 1.0, 200.0)
        for number in (1, 2, 1, 4, 2, 8, 16, 1):
            batch = [replace(requests.pop(), at_s=0.0) for _ in range(number * self.members)]
            await self.replay(batch, limit_s=60.0)
        spec = await self.measured()
        return replace(spec, way_s=await self._way_s(spec.step_time))

    async def measured(self) -> MemberSpec:
        """A member as they have measured their steps of late, on average; of the way to them nothing."""
        await asyncio.sleep(_REPORTED_S)
        loads = [status.load for status in self.fleet.members() if status.load is not None]
        names = [each.name for each in fields(StepTime)]
        step = StepTime(**{name: statistics.fmean(getattr(load.step_time, name) for load in loads) for name in names})
        return replace(spec_of(loads[0]), step_time=step)

    async def _way_s(self, step: StepTime) -> float:
        """As benchmarks.replay.way_s, by the step's predicted time."""
        rng = random.Random(8)
        tenant = next(iter(self.keys))
        alone = [
            Arrival(
                at_s=0.4 * number, prompt=tuple(rng.randrange(2000) for _ in range(PROMPTS[0])), output=1, tenant=tenant
            )
            for number in range(12)
        ]
        seen = await self.replay(alone, limit_s=60.0)
        step_s = step.step_s(prefill_tokens=PROMPTS[0], decode_rows=0, context_tokens=0)
        return max((statistics.median(each.ttft_s for each in seen) - step_s) / 2, 0.0)


def cpu_s() -> dict[str, float]:
    """Seconds that our processes have computed: members' ranks, gateways, clients that have ended, and all of Ray's."""
    found = dict.fromkeys(("ranks", "gateways", "clients", "ray"), 0.0)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            name, times = " ".join(process.cmdline()), process.cpu_times()
            kind = "ranks" if "RankHost" in name else "gateways" if "Gateway" in name else "ray"
            found[kind] += times.user + times.system
    ended = psutil.Process().cpu_times()
    found["clients"] = ended.children_user + ended.children_system
    return found


@contextmanager
def serving(model: Path, dtype: Dtype, members: int, tenants: Sequence[str]) -> Iterator[HttpFleet]:
    """Members of one thread each, as benchmarks.replay.make_member makes them, with one gateway."""
    keys = {tenant: f"key-{tenant or 'any'}" for tenant in tenants}
    room = {"kv_memory": "1GiB", "max_rows": ROWS, "max_step_tokens": STEP_TOKENS, "chunk_tokens": STEP_TOKENS}
    pools = {"mixed": {"members": members, "threads": 1, **room}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.txt"
        file.write_text("".join(f"{key} {tenant}\n" for tenant, key in keys.items()))
        http = {"api_keys_file": str(file)}
        with RayFleet(model, pools, http=http, dtype=dtype, max_model_len=1024) as fleet:
            yield HttpFleet(fleet=fleet, members=members, keys=keys)
