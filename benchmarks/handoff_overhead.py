"""What a hand-off adds to one request: from its first token to the decode member's first, less a mixed member's step.

    python -m benchmarks.handoff_overhead [--models tiny] [--prompts 128 1024 4000] [--tp 1 2] [--repeats 20]
        [--transports auto tcp p2p] [--gb-s 6 2.5 2] [--early on chunks off] [--chunk 1024]
        [--kv-heads 4] [--head-dim 256] [--checkpoint DIR]

Members with real engines behind real streams, all on this machine, one request at a time. Prints one JSON line a model,
tp, transport and prompt: medians in milliseconds, the time of all of a request's pulls together, and the bar for the
overhead: 10 ms, and the request's bytes at half of the transport's bandwidth (`--gb-s`, from `benchmarks.handoff`).
`--kv-heads` and `--head-dim` give a token more KV, `--checkpoint` takes a model of one's own. With `--early off`
everything is fetched when the prompt is done, with `chunks` what earlier steps have computed of it before, with `on`
the layers of its last step too.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import KvTransport
from cluster.dispatcher import Dispatcher
from deploy.checkpoint import Size, write_random_checkpoint
from router.request import Request, RequestId, SamplingParams
from tests.support.members import EngineMember, dispatching

Early = Literal["on", "chunks", "off"]
ARCHITECTURES = ("qwen3_moe", "qwen3_next")
NEW_TOKENS = 4
VOCAB = 2048


def make_request(index: int, prompt: int) -> Request:
    """A prompt that no cache holds."""
    ids = random.Random(index).choices(range(100, VOCAB), k=prompt)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
    return Request(id=RequestId(f"r{index}"), prompt_ids=tuple(ids), sampling=sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Members to measure."""

    folder: Path
    tp: int
    way: KvTransport
    early: Early
    chunk: int
    gb_s: float
    prompts: Sequence[int]
    repeats: int


async def times_ms(dispatcher: Dispatcher, request: Request) -> tuple[float, float]:
    """To the first token, and from it to the second."""
    times = [time.perf_counter()]
    async for _ in dispatcher.generate(request):
        times.append(time.perf_counter())
    return 1e3 * (times[1] - times[0]), 1e3 * (times[2] - times[1])


async def medians_ms(dispatcher: Dispatcher, prompt: int, repeats: int) -> tuple[float, float]:
    """One request after the other, two more for warming up -> (to the first token, to the second)."""
    found = []
    for index in range(repeats + 2):
        found.append(await times_ms(dispatcher, make_request(1000 * prompt + index, prompt)))
        # Members let go of what the last one held.
        await asyncio.sleep(0.05)
    firsts, gaps = zip(*found[2:], strict=True)
    return statistics.median(firsts), statistics.median(gaps)


def make_member(name: str, case: Case) -> EngineMember:
    """A member whose name says its role."""
    role = "prefill" if name == "p" else "decode" if name == "d" else "mixed"
    return EngineMember(
        name,
        role,
        case.folder,
        tp=case.tp,
        kv_memory_bytes=512 << 20,
        chunk=case.chunk,
        step_tokens=case.chunk,
        max_model_len=max(case.prompts) + NEW_TOKENS,
        dtype="bfloat16",
        kv_transport=case.way,
        early_tokens=1 << 40 if case.early == "off" else 256,
        offers_layers=case.early == "on",
    )


async def measure(case: Case) -> list[dict[str, object]]:
    """All prompts on a mixed member, then on a prefill and a decode member."""
    async with dispatching([make_member("m", case)]) as dispatcher:
        whole = [await medians_ms(dispatcher, prompt, case.repeats) for prompt in case.prompts]
    members = [make_member(name, case) for name in "pd"]
    found: list[dict[str, object]] = []
    async with dispatching(members) as dispatcher:
        for prompt, (ttft_ms, step_ms) in zip(case.prompts, whole, strict=True):
            before = members[1].engine.stats()
            first_ms, gap_ms = await medians_ms(dispatcher, prompt, case.repeats)
            after = members[1].engine.stats()
            if after.failed_pulls:
                raise RuntimeError(f"{after.failed_pulls} pulls failed")
            requests = case.repeats + 2
            num_bytes = (after.pulled_bytes - before.pulled_bytes) // requests
            found.append(
                {
                    "prompt": prompt,
                    "mb": round(num_bytes / 1e6, 2),
                    "mixed_ttft_ms": round(ttft_ms, 1),
                    "ttft_ms": round(first_ms, 1),
                    "step_ms": round(step_ms, 2),
                    "gap_ms": round(gap_ms, 2),
                    "overhead_ms": round(gap_ms - step_ms, 2),
                    "bar_ms": round(10 + 2e3 * num_bytes / case.gb_s / 1e9, 2),
                    "pulls": (after.pulls - before.pulls) / requests,
                    "pull_ms": round(1e3 * (after.pull_s - before.pull_s) / requests, 2),
                }
            )
    return found


def make_cases(args: argparse.Namespace, folder: Path) -> list[Case]:
    """All that were asked for."""
    return [
        Case(
            folder=folder,
            tp=tp,
            way=way,
            early=early,
            chunk=args.chunk,
            gb_s=gb_s,
            prompts=args.prompts,
            repeats=args.repeats,
        )
        for tp in args.tp
        for way, gb_s in zip(args.transports, args.gb_s, strict=True)
        for early in args.early
    ]


def print_cases(args: argparse.Namespace, folder: Path, model: str) -> None:
    """A JSON line a measurement of one model."""
    for case in make_cases(args, folder):
        about = {"model": model, "tp": case.tp, "way": case.way, "early": case.early}
        for result in asyncio.run(measure(case)):
            print(json.dumps({**about, **result}), flush=True)


def main() -> None:
    """Print one JSON line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("tiny", "small"), nargs="+", default=["tiny"])
    parser.add_argument("--architectures", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--checkpoint", type=Path, help="folder of a model to take instead")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4000])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--transports", nargs="+", default=["auto"], help="as engine.kv_transport")
    parser.add_argument("--gb-s", type=float, nargs="+", default=[6.0], help="bandwidth of each of the transports")
    parser.add_argument("--early", choices=("on", "chunks", "off"), nargs="+", default=["on"])
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--kv-heads", type=int, default=2, help="of the attention layers, of as many query heads or 4")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.checkpoint is not None:
        print_cases(args, args.checkpoint, args.checkpoint.name)
        return
    sizes: list[Size] = args.models
    for size in sizes:
        for architecture in args.architectures:
            with tempfile.TemporaryDirectory() as folder:
                heads = {"num_key_value_heads": args.kv_heads, "num_attention_heads": max(args.kv_heads, 4)}
                shape = heads | {"head_dim": args.head_dim, "max_position_embeddings": 2 * max(args.prompts)}
                write_random_checkpoint(architecture, size, 0, Path(folder), overrides=shape)
                print_cases(args, Path(folder), f"{architecture} {size}")


if __name__ == "__main__":
    main()
