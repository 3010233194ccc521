"""One member through Ray actors against the same engine in process: `python -m benchmarks.ray_member --model DIR`.

Both serve the same batches of random prompts; rates are medians without the prompts, as `moefleet bench engine` has
them. The Ray side counts all that a gateway waits for: actors, the member's service, the connection and the
reader of its stream.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import ray
import uvloop

from cluster.config import EngineConfig
from cluster.directory import find_directory
from cluster.local_ray import start_local_ray
from cluster.member import PoolMember, PoolMemberConfig
from cluster.member_client import MemberClient, MemberStream
from deploy.bench_engine import DTYPES, BenchEngine
from router.request import Request, RequestId, SamplingParams
from shards.mesh import Layout

PROMPT = 128
NEW = 128
Prompts = list[list[int]]


def decode_rate(rows: int, first: Sequence[float], whole: Sequence[float]) -> float:
    """Tokens a second behind the first ones."""
    return rows * (NEW - 1) / (statistics.median(whole) - statistics.median(first))


def in_process(config: EngineConfig, prompts: Prompts, repeat: int) -> float:
    """Decode rate of an engine of this process."""
    with BenchEngine(config) as engine:
        engine.generate(prompts, 8)
        first = [engine.generate(prompts, 1).wall_s for _ in range(repeat)]
        return decode_rate(len(prompts), first, [engine.generate(prompts, NEW).wall_s for _ in range(repeat)])


async def through_ray(config: EngineConfig, prompts: Prompts, repeat: int) -> float:
    """Decode rate of a member whose ranks are Ray actors."""
    async with serving(config) as client:
        names = count()

        async def wall(max_new: int) -> float:
            started = time.perf_counter()
            streams = [submit(client, f"r{next(names)}", prompt, max_new) for prompt in prompts]
            await asyncio.gather(*(read(stream) for stream in streams))
            return time.perf_counter() - started

        await wall(8)
        first = [await wall(1) for _ in range(repeat)]
        return decode_rate(len(prompts), first, [await wall(NEW) for _ in range(repeat)])


def submit(client: MemberClient, name: str, prompt: list[int], max_new: int) -> MemberStream:
    """Send a greedy request that ends by its length."""
    sampling = SamplingParams(max_tokens=max_new, temperature=0.0)
    return client.submit(Request(id=RequestId(name), prompt_ids=tuple(prompt), sampling=sampling), mode="full")


async def read(stream: MemberStream) -> None:
    """Take every event."""
    async for _ in stream:
        pass


@asynccontextmanager
async def serving(config: EngineConfig) -> AsyncIterator[MemberClient]:
    """A connected client of a member on a Ray cluster of its own."""
    start_local_ray(num_cpus=4)
    member = PoolMember(PoolMemberConfig(role="mixed", engine=config, drain_s=1.0))
    try:
        await member.start()
        directory = find_directory("moefleet")
        assert directory is not None
        (status,) = await directory.statuses.remote()
        client = MemberClient(
            status.info,
            await directory.token.remote(),
            on_load=lambda _: None,
            on_cache=lambda _: True,
            on_lost=lambda _: None,
        )
        client.start()
        while client.hello is None:
            await asyncio.sleep(0.01)
        yield client
        await client.close()
        await member.stop()
    finally:
        ray.shutdown()


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    config = EngineConfig(
        model=options.model,
        layout=Layout(tp=options.tp),
        dtype=DTYPES[options.dtype],
        threads=options.threads,
        max_rows=options.rows,
        max_model_len=PROMPT + NEW,
        prefix_cache=False,
    )
    rng = random.Random(7)
    prompts = [[rng.randrange(500) for _ in range(PROMPT)] for _ in range(options.rows)]
    own = in_process(config, prompts, options.repeat)
    # As gateways, which are Serve's replicas, do.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rays = runner.run(through_ray(config, prompts, options.repeat))
    found = {"rows": options.rows, "in_process_tok_s": round(own, 1), "ray_tok_s": round(rays, 1)}
    print(json.dumps(found | {"ratio": round(rays / own, 3)}))


if __name__ == "__main__":
    main()
