"""Faults at each step of a hand-off: `python -m benchmarks.handoff_faults [--out FILE.md]`.

A prefill and a decode member of two ranks each, with processes, sockets and a gateway; leases of 1 s and 2 s of grace.
For each fault the table says how the request ended, and after how many seconds the members that live had all blocks
and state slots free and nothing running. Takes two minutes. Exit status 1 when one held something for longer than its
lease, or a request could not be brought to the step.
"""

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path

from deploy.checkpoint import write_random_checkpoint
from tests.support.handoff_faults import (
    GENTLE,
    KILLS,
    STEPS,
    Fault,
    Outcome,
    Step,
    StillHeldError,
    damage,
    inject,
    overstay,
    pair,
)


class Table:
    """Lines as they come."""

    def __init__(self) -> None:
        self.lines = ["| fault | at | the request | free after |", "|---|---|---|---|"]
        self.num_failed = 0

    async def add(self, fault: str, step: str, work: Awaitable[Outcome]) -> None:
        """Carry out one fault."""
        try:
            outcome = await work
            line = f"| {fault} | {step} | {outcome.ended}, {len(outcome.tokens)} tokens | {outcome.free_s:.2f} s |"
        except StillHeldError as held:
            self.num_failed += 1
            line = f"| {fault} | {step} | | NOT FREE within the lease: {held} |"
        except TimeoutError:
            self.num_failed += 1
            line = f"| {fault} | {step} | the step was not reached | |"
        self.lines.append(line)
        print(line, file=sys.stderr, flush=True)


async def killed(checkpoint: Path, fault: Fault, step: Step) -> Outcome:
    """A fault that costs its members."""
    async with pair(checkpoint) as one:
        return await inject(one, fault, step)


async def damaged(checkpoint: Path, offsets: tuple[int, ...], name: str) -> Outcome:
    """Bytes that arrive changed."""
    return (await damage(checkpoint, offsets, name))[0]


async def run(checkpoint: Path) -> Table:
    """All faults."""
    table = Table()
    for fault in GENTLE:
        # A pair each: what goes wrong with one fault is not told of others.
        async with pair(checkpoint) as one:
            for step in STEPS:
                await table.add(fault, step, inject(one, fault, step))
    async with pair(checkpoint) as one:
        late: Step
        for late in ("queued at decode", "pull"):
            await table.add("lease runs out", late, overstay(one, late))
    for fault in KILLS:
        for step in STEPS:
            await table.add(fault, step, killed(checkpoint, fault, step))
    once, ever = (5000,), tuple(range(3000, 300_000, 1000))
    await table.add("a frame is damaged", "pull", damaged(checkpoint, once, "a frame is damaged"))
    await table.add("every frame is damaged", "pull", damaged(checkpoint, ever, "every frame is damaged"))
    return table


def main() -> int:
    """Cause each fault and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    out: Path | None = parser.parse_args().out
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint("qwen3_next", "tiny", 0, Path(folder))
        table = asyncio.run(run(Path(folder)))
    text = "\n".join(table.lines) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    return int(table.num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
