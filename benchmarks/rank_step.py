"""A decode step of one rank, without an engine: `python -m benchmarks.rank_step --model DIR [--rows 1 8 32]`.

What a step takes beside its kernels shows on a model of a few million parameters, whose kernels take next to nothing.
Prints a JSON line for each number of rows: median, quickest, mean and 99th percentile of steps in microseconds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from cluster.config import Dtype
from deploy.bench_engine import DTYPES
from shards.batch import RowSampling, RowStart, StepBatch
from shards.comm import Comms
from shards.mesh import Layout, Place
from shards.rank import Rank, RankConfig

PROMPT = 128
BLOCK = 16
UNTIMED = 5
"""Steps of which the first is written down, and caches fill."""


def loaded_rank(model: Path, dtype: Dtype, rows: int, steps: int, threads: int | None) -> Rank:
    """A rank with room for the rows."""
    length = PROMPT + UNTIMED + steps + 1
    config = RankConfig(
        model=model,
        place=Place(layout=Layout(), rank=0),
        dtype=dtype,
        block_size=BLOCK,
        num_blocks=rows * -(-length // BLOCK),
        num_slots=rows + 1,
        max_rows=rows,
        max_model_len=length,
        threads=threads,
    )
    rank = Rank(config, Comms.local())
    rank.load()
    return rank


def step_times(rank: Rank, rows: int, steps: int) -> list[float]:
    """Seconds of each step, behind prompts that were computed and steps that are not timed."""
    blocks = rank.config.num_blocks // rows
    starts = tuple(
        RowStart(
            row=row,
            token_ids=tuple((7 * row + 3 * i) % rank.model_config.vocab_size for i in range(PROMPT)),
            prompt_len=PROMPT,
            blocks=tuple(range(row * blocks, (row + 1) * blocks)),
            state_slot=row,
            sampling=RowSampling(temperature=0.0),
        )
        for row in range(rows)
    )
    ids, each = list(range(rows)), [1] * rows
    rank.step(StepBatch(starts=starts, rows_S=ids, first_S=[0] * rows, counts_S=[PROMPT] * rows, samples_S=each))
    times: list[float] = []
    for at in range(PROMPT, PROMPT + UNTIMED + steps):
        batch = StepBatch(rows_S=ids, first_S=[at] * rows, counts_S=each, samples_S=each)
        started = time.perf_counter()
        rank.step(batch)
        times.append(time.perf_counter() - started)
    return times[UNTIMED:]


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    for rows in options.rows:
        rank = loaded_rank(options.model, DTYPES[options.dtype], rows, options.steps, options.threads)
        micros = sorted(1e6 * seconds for seconds in step_times(rank, rows, options.steps))
        rank.close()
        found = {
            "median_us": statistics.median(micros),
            "least_us": micros[0],
            "mean_us": statistics.fmean(micros),
            "p99_us": micros[-1 - len(micros) // 100],
        }
        print(json.dumps({"rows": rows} | {name: round(value, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
