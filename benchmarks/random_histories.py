"""Random histories of two members: `python -m benchmarks.random_histories [MODEL] [--tp N] [--dp N] [--ep N]`.

Prefix cache, drafts, chunked prompts, preemption, aborts and hand-offs happen all at once on real ranks; every request
must get the tokens that it gets alone, without drafts, nothing cached, and blocks and states are accounted for after
every step. MODEL is a Qwen3-Next checkpoint with a multi-token prediction head; without it a small random one is made
whose drafts are right now and then. Hypothesis makes the histories, others in every run; one that goes wrong ends it,
shrunk and told as a program. Prints what happened. Members of several ranks have a process for each; they meet over
gloo.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from shards.mesh import Layout
from tests.support.history_machine import run_histories
from tests.support.mtp import make_mtp_reference
from tests.support.random_histories import open_world

DISTURBANCE = 1.4
"""Some drafts of the model made here are right, and some wrong."""
REPORT_EVERY = 50


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--actions", type=int, default=30, help="of a history, before it comes to its end")
    for axis in ("tp", "dp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="of each member; its ranks meet over gloo")
    args = parser.parse_args()
    layout = Layout(tp=args.tp, dp=args.dp, ep=args.ep)
    with TemporaryDirectory() as folder:
        if args.model is None:
            make_mtp_reference(Path(folder), disturbance=DISTURBANCE)
        began = time.perf_counter()
        with open_world(args.model or Path(folder), layout) as world:
            for done in range(0, args.count, REPORT_EVERY):
                run_histories(world, min(REPORT_EVERY, args.count - done), actions=args.actions)
                print(f"{time.perf_counter() - began:.1f} s: {world.counts}", flush=True)


if __name__ == "__main__":
    main()
