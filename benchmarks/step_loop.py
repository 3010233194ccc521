"""Times what the engine's loop costs a step: `python benchmarks/step_loop.py [--rows 1 8 32 64] [--json]`.

The ranks answer at once, so that what remains is the loop's own work: take commands, schedule, hand out the plan,
commit the answers, give out events. CPU time of the engine's thread, so that other work of the machine disturbs little;
the median over the steps in which all rows decode.
"""

import argparse
import json
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

from cluster.engine import Engine, EngineEvent, EngineOutlets
from cluster.plan import HandoffReady, KvTicket, PullDone, StepOutput, StepPlan
from cluster.scheduler_config import SchedulerConfig
from router.errors import MoefleetError
from router.request import Request, RequestId, SamplingParams, TokenEvent
from shards.batch import LaneOutput

BLOCK = 16
PROMPT = 128
NEW = 512


class InstantRanks:
    """Ranks whose answers are there at once; notes the engine thread's CPU time at every launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, float]] = []
        """Rows of a step, and the thread's CPU seconds when it was launched."""
        self._outputs: deque[StepOutput] = deque()

    def launch(self, plan: StepPlan) -> None:
        """As `Ranks.launch`."""
        (batch,) = plan.lanes
        self.launches.append((len(batch.rows_S), time.thread_time()))
        rows = batch.rows_S
        if 0 in batch.samples_S:
            rows = [row for row, samples in zip(rows, batch.samples_S, strict=True) if samples]
        self._outputs.append(StepOutput(step=plan.step, lanes=(LaneOutput(rows_N=rows, tokens_N=[7] * len(rows)),)))

    def result(self) -> StepOutput:
        """As `Ranks.result`."""
        return self._outputs.popleft()

    def poll_pulls(self) -> list[PullDone]:
        """As `Ranks.poll_pulls`."""
        return []

    def wake_on(self, wake: Callable[[], None]) -> None:
        """As `Ranks.wake_on`."""

    def close(self) -> None:
        """As `Ranks.close`."""


def step_seconds(rows: int) -> list[float]:
    """CPU seconds of each step in which `rows` sequences decode; they fill blocks at different steps."""
    ranks, ended = InstantRanks(), threading.Event()
    engine = Engine(limits_for(rows), ranks, make_outlets(rows, ended))
    for index in range(rows):
        prompt = tuple(range(index * PROMPT, (index + 1) * PROMPT - index % BLOCK))
        sampling = SamplingParams(max_tokens=NEW, temperature=0.0)
        engine.submit(Request(id=RequestId(str(index)), prompt_ids=prompt, sampling=sampling))
    engine.start()
    ended.wait()
    engine.stop()
    full = [at for count, at in ranks.launches if count == rows]
    # The first step's are the prompts.
    return [after - before for before, after in pairwise(full[1:])]


def limits_for(rows: int) -> SchedulerConfig:
    """Room for all rows at once."""
    return SchedulerConfig(
        lanes=1,
        num_blocks=rows * (PROMPT + NEW) // BLOCK + rows,
        num_slots=0,
        block_size=BLOCK,
        max_rows=rows,
        max_step_tokens=max(rows * PROMPT, 64),
        chunk_tokens=PROMPT,
        max_model_len=PROMPT + NEW,
        vocab_size=1 << 16,
        prefix_cache=True,
        lease_s=10.0,
        max_waiting=rows,
    )


def make_outlets(rows: int, ended: threading.Event) -> EngineOutlets:
    """Outlets that only look for the last event of every request."""
    open_requests = rows

    def take(events: list[EngineEvent]) -> None:
        nonlocal open_requests
        open_requests -= sum(isinstance(event, TokenEvent) and event.finish is not None for event in events)
        if not open_requests:
            ended.set()

    def no_ticket(_: HandoffReady) -> KvTicket:
        raise AssertionError("no request asked for a hand-off")

    def no_failure(error: MoefleetError) -> None:
        raise AssertionError from error

    return EngineOutlets(on_events=take, make_ticket=no_ticket, on_failure=no_failure)


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for rows in options.rows:
        times = [1e6 * seconds for seconds in step_seconds(rows)]
        found = {
            "rows": rows,
            "median_us": round(statistics.median(times), 1),
            "p90_us": round(sorted(times)[len(times) * 9 // 10], 1),
        }
        print(
            json.dumps(found)
            if options.json
            else f"{rows:3} rows: {found['median_us']} us a step (p90 {found['p90_us']})"
        )


if __name__ == "__main__":
    main()
