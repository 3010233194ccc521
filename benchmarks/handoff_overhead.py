"""What a hand-off adds to one request: from its first token to the decode member's first, less a mixed member's step.

    python -m benchmarks.handoff_overhead [--models tiny] [--prompts 128 1024 4000] [--tp 1 2] [--repeats 20]

Members with real engines behind real streams, all on this machine, one request at a time. Prints one JSON line a model,
tp and prompt: medians in milliseconds, and of the overhead the part that the pull itself took.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.dispatcher import Dispatcher
from deploy.checkpoint import Size, write_random_checkpoint
from router.request import Request, RequestId, SamplingParams
from tests.support.members import EngineMember, dispatching

ARCHITECTURES = ("qwen3_moe", "qwen3_next")
NEW_TOKENS = 4
VOCAB = 2048


def make_request(index: int, prompt: int) -> Request:
    """A prompt that no cache holds."""
    ids = random.Random(index).choices(range(100, VOCAB), k=prompt)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    return Request(id=RequestId(f"r{index}"), prompt_ids=tuple(ids), sampling=sampling)


async def gap_ms(dispatcher: Dispatcher, request: Request) -> float:
    """From the first token to the second."""
    times = []
    async for _ in dispatcher.generate(request):
        times.append(time.perf_counter())
    return 1e3 * (times[1] - times[0])


async def gaps_ms(dispatcher: Dispatcher, prompt: int, repeats: int) -> list[float]:
    """One request after the other, a few more for warming up."""
    gaps = []
    for index in range(repeats + 3):
        gaps.append(await gap_ms(dispatcher, make_request(1000 * prompt + index, prompt)))
        # Members let go of what the last one held.
        await asyncio.sleep(0.05)
    return gaps[3:]


def make_member(name: str, folder: Path, tp: int, longest: int) -> EngineMember:
    """A member whose name says its role."""
    role = "prefill" if name == "p" else "decode" if name == "d" else "mixed"
    return EngineMember(
        name,
        role,
        folder,
        tp=tp,
        kv_memory_bytes=256 << 20,
        chunk=1024,
        step_tokens=1024,
        max_model_len=longest + NEW_TOKENS,
        dtype="bfloat16",
    )


async def measure(folder: Path, tp: int, prompts: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """All prompts on a mixed member, then on a prefill and a decode member."""
    async with dispatching([make_member("m", folder, tp, max(prompts))]) as dispatcher:
        steps = [await gaps_ms(dispatcher, prompt, repeats) for prompt in prompts]
    members = [make_member(name, folder, tp, max(prompts)) for name in "pd"]
    found = []
    async with dispatching(members) as dispatcher:
        for prompt, step in zip(prompts, steps, strict=True):
            before = members[1].engine.stats()
            gaps = await gaps_ms(dispatcher, prompt, repeats)
            after = members[1].engine.stats()
            if after.failed_pulls:
                raise RuntimeError(f"{after.failed_pulls} pulls failed")
            pulls = after.pulls - before.pulls
            found.append(
                {
                    "prompt": prompt,
                    "bytes": (after.pulled_bytes - before.pulled_bytes) // pulls,
                    "step_ms": round(statistics.median(step), 3),
                    "gap_ms": round(statistics.median(gaps), 3),
                    "overhead_ms": round(statistics.median(gaps) - statistics.median(step), 3),
                    "pull_ms": round(1e3 * (after.pull_s - before.pull_s) / pulls, 3),
                }
            )
    return found


def main() -> None:
    """Print one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("tiny", "small"), nargs="+", default=["tiny"])
    parser.add_argument("--architectures", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4000])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    sizes: list[Size] = args.models
    for size in sizes:
        for architecture in args.architectures:
            with tempfile.TemporaryDirectory() as folder:
                write_random_checkpoint(architecture, size, 0, Path(folder))
                for tp in args.tp:
                    for result in asyncio.run(measure(Path(folder), tp, args.prompts, args.repeats)):
                        print(json.dumps({"model": f"{architecture} {size}", "tp": tp, **result}), flush=True)


if __name__ == "__main__":
    main()
