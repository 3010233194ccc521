"""Random histories of two members: `python -m benchmarks.random_histories [MODEL] [--tp N] [--dp N] [--ep N]`.

Prefix cache, drafts, chunked prompts, preemption, aborts and hand-offs happen all at once on real ranks; every request
must get the tokens that it gets alone, without drafts, nothing cached. MODEL is a Qwen3-Next checkpoint with a
multi-token prediction head; without it a small random one is made whose drafts are right now and then. Prints what
happened; a history that goes wrong ends it and is told with its seed, which --seed SEED --count 1 repeats. Members of
several ranks have a process for each; they meet over gloo.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from shards.mesh import Layout
from tests.support.mtp import make_mtp_reference
from tests.support.random_histories import open_histories

DISTURBANCE = 1.4
"""Some drafts of the model made here are right, and some wrong."""
REPORT_EVERY = 250


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first history; the others' follow")
    for axis in ("tp", "dp", "ep"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="of each member; its ranks meet over gloo")
    args = parser.parse_args()
    layout = Layout(tp=args.tp, dp=args.dp, ep=args.ep)
    with TemporaryDirectory() as folder:
        if args.model is None:
            make_mtp_reference(Path(folder), disturbance=DISTURBANCE)
        began = time.perf_counter()
        with open_histories(args.model or Path(folder), layout) as histories:
            for done in range(args.count):
                histories.run(args.seed + done)
                if (done + 1) % REPORT_EVERY == 0 or done + 1 == args.count:
                    print(f"{time.perf_counter() - began:.1f} s: {histories.counts}", flush=True)


if __name__ == "__main__":
    main()
