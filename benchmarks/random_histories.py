"""Random histories of two members: `python -m benchmarks.random_histories [MODEL] [--count N] [--share PART] [--gloo]`.

Prefix cache, drafts, chunked prompts, preemption, aborts and hand-offs happen all at once on real engines, whose turns
are given one by one, and real ranks; every request must get the tokens that it gets alone, without drafts, nothing
cached, and blocks and states are accounted for after every step. MODEL is a Qwen3-Next checkpoint with a multi-token
prediction head; without it a small random one is made whose drafts are right now and then. Hypothesis makes the
histories, others in every run; one that goes wrong ends it, shrunk and told as a program. A share of them is of members
of several ranks, a process each, which stay from one history to the next; they meet in shared memory, or over gloo.
Prints what happened, by layout.
"""

import argparse
import itertools
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from shards.mesh import Layout
from tests.support.history_machine import World, run_histories
from tests.support.mtp import make_mtp_reference
from tests.support.random_histories import open_world

DISTURBANCE = 1.4
"""Some drafts of the model made here are right, and some wrong."""
AT_ONCE = 50
"""Histories of a layout before the next one has its turn: hypothesis begins with the simplest ones each time."""
LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2 ep2": Layout(tp=2, ep=2),
    "dp2": Layout(dp=2),
    "dp2 ep2": Layout(dp=2, ep=2),
}


def run(worlds: dict[str, World], counts: dict[str, int], actions: int) -> None:
    """So many histories of each layout, in turns."""
    began, left = time.perf_counter(), dict(counts)
    for name in itertools.cycle(worlds):
        if not any(left.values()):
            return
        now = min(left[name], AT_ONCE)
        if now:
            run_histories(worlds[name], now, actions=actions)
            left[name] -= now
            print(f"{time.perf_counter() - began:.1f} s, {name}: {worlds[name].counts}", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--actions", type=int, default=30, help="of a history, before it comes to its end")
    parser.add_argument("--share", type=float, default=0.25, help="part of the histories that are on several ranks")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of those")
    parser.add_argument("--gloo", action="store_true", help="several ranks meet over gloo, as those of several hosts")
    args = parser.parse_args()
    # Pulls fail all the time here, and members say so.
    logging.getLogger("cluster").setLevel(logging.ERROR)
    several = int(args.share * args.count) // len(args.layouts)
    counts = {"one rank": args.count - several * len(args.layouts)} | dict.fromkeys(args.layouts, several)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        if args.model is None:
            make_mtp_reference(Path(folder), disturbance=DISTURBANCE)
        worlds = {
            name: stack.enter_context(open_world(args.model or Path(folder), LAYOUTS.get(name), one_host=not args.gloo))
            for name, count in counts.items()
            if count
        }
        run(worlds, {name: counts[name] for name in worlds}, args.actions)


if __name__ == "__main__":
    main()
