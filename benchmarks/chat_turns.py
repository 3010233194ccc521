"""What each turn of a chat finds of the turns before it: `python -m benchmarks.chat_turns MODEL [--turns 10]`.

Every turn's prompt is all that was said before and some new tokens. Printed by turn: what the router knows to be usable
before it (KV, and a recurrent state to go on from), `cached_tokens` as usage tells them, what is computed, and the time
to the first token beside that of an engine without prefix cache, which must give the same tokens.
"""

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import EngineConfig
from router.caches import Caches
from router.prompt import Prompt
from router.request import Request, RequestId, SamplingParams
from shards.families import load_model_config
from tests.support.live_engine import LiveEngine, live_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn, served by an engine with prefix cache and by one without."""

    prompt_tokens: int
    routed_tokens: int
    """What the router expected to be usable, by the member's cache events."""
    cached_tokens: int
    ttft_s: float
    cold_ttft_s: float


class Known:
    """What a router knows of one member's cache."""

    def __init__(self, engine: LiveEngine, block_size: int) -> None:
        self._engine = engine
        self._block_size = block_size
        self._caches = Caches(block_size, max_expected=1)
        self._number = self._caches.add(engine.load())
        self._sequence: int | None = None

    def usable_tokens(self, request: Request) -> int:
        """How much of a prompt the member can go on from."""
        for events in self._engine.cache_events(self._sequence):
            self._caches.take_events(self._number, events)
            self._sequence = events.sequence
        prompt = Prompt(request.id, num_tokens=len(request.prompt_ids), max_output=0, source=request)
        depths = self._caches.depths(prompt, time.time())
        return self._block_size * next((depth for depth, members in depths if members >> self._number & 1), 0)


def serve(engine: LiveEngine, request: Request) -> tuple[list[int], int, float]:
    """The answer's tokens, the prompt's cached ones, and the seconds to the first token."""
    began = time.perf_counter()
    first_s = 0.0
    tokens: list[int] = []
    cached = 0
    for event in engine.stream(request):
        first_s = first_s or time.perf_counter() - began
        cached += event.cached_tokens
        if event.token_id is not None:
            tokens.append(event.token_id)
    return tokens, cached, first_s


def chat(config: EngineConfig, *, turns: int, asked: int, answered: int) -> Iterator[Turn]:
    """The turns of one chat."""
    rng, vocab = random.Random(0), load_model_config(config.model).vocab_size
    said: list[int] = []
    with ExitStack() as stack:
        warm = stack.enter_context(live_engine(config))
        cold = stack.enter_context(live_engine(replace(config, prefix_cache=False)))
        for engine in (warm, cold):
            serve(
                engine, Request(id=RequestId("first"), prompt_ids=(1,) * asked, sampling=SamplingParams(max_tokens=2))
            )
        known = Known(warm, config.block_size)
        for turn in range(turns):
            said += rng.choices(range(vocab), k=asked)
            sampling = SamplingParams(max_tokens=answered, temperature=0.0)
            request = Request(id=RequestId(f"turn {turn}"), prompt_ids=tuple(said), sampling=sampling)
            routed = known.usable_tokens(request)
            tokens, cached, ttft_s = serve(warm, request)
            again, _, cold_s = serve(cold, request)
            assert tokens == again, f"turn {turn} gets other tokens with the cache: {tokens} and {again}"
            yield Turn(
                prompt_tokens=len(said), routed_tokens=routed, cached_tokens=cached, ttft_s=ttft_s, cold_ttft_s=cold_s
            )
            said += tokens


def main() -> None:
    """Serve and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--asked", type=int, default=60, help="new tokens of a turn's prompt")
    parser.add_argument("--answered", type=int, default=40, help="tokens of an answer")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    length = args.turns * (args.asked + args.answered)
    config = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        max_rows=1,
        max_model_len=length,
        threads=args.threads,
    )
    print("turn  prompt  routed  cached  computed  ttft ms  without cache")
    for turn, found in enumerate(chat(config, turns=args.turns, asked=args.asked, answered=args.answered), start=1):
        computed = found.prompt_tokens - found.cached_tokens
        print(
            f"{turn:4d}  {found.prompt_tokens:6d}  {found.routed_tokens:6d}  {found.cached_tokens:6d}  {computed:8d}  "
            f"{1000 * found.ttft_s:7.1f}  {1000 * found.cold_ttft_s:13.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
