"""Tokens after a hand-off, for every pair of layouts: `python -m benchmarks.handoff_pairs [--out FILE.md]`.

Each layout prefills for each, Qwen3-MoE and Qwen3-Next, greedy and sampled requests of 1 to 130 tokens; every token is
compared with those of one rank that does both. Takes about six minutes on two cores. Exit status 1 when one differs.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from router.request import Request, TokenEvent
from shards.mesh import Layout
from tests.support.disaggregated import LAYOUTS, hand_over_to_each, pair_requests
from tests.support.exactness import same_bits
from tests.support.exactness_matrix import CASES, describe, engine_config, replica, run_case
from tests.support.reference import make_reference

ARCHITECTURES = ("qwen3_moe", "qwen3_next")


def tokens_of(served: Sequence[Sequence[TokenEvent]]) -> list[list[int | None]]:
    """Of each request."""
    return [[event.token_id for event in events] for events in served]


def pair_rows(architecture: str, folder: Path, requests: Sequence[Request]) -> list[tuple[str, ...]]:
    """A line for each pair: architecture, prefill, decode, tokens, bits, failed pulls."""
    with replica(engine_config(folder, Layout())) as (engine, ranks):
        whole = run_case(engine, ranks, CASES[0], requests).events
    rows: list[tuple[str, ...]] = []
    for source in LAYOUTS:
        for apart in hand_over_to_each(folder, source, requests):
            same = sum(ours == theirs for ours, theirs in zip(tokens_of(apart.events), tokens_of(whole), strict=True))
            bits = "same" if same_bits(whole, apart.events) else "differ"
            layouts = (describe(source), describe(apart.target))
            rows.append((architecture, *layouts, f"{same}/{len(requests)}", bits, str(apart.stats.failed_pulls)))
            print(*rows[-1], file=sys.stderr)
    return rows


def main() -> int:
    """Run every pair and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    parser.add_argument("--architectures", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    given = parser.parse_args()
    out: Path | None = given.out
    requests = pair_requests(131)
    lines = ["| model | prefill | decode | requests with equal tokens | bits | failed pulls |", "|" + "---|" * 6]
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        for architecture in given.architectures:
            path = Path(folder) / architecture
            make_reference(path, architecture)
            for row in pair_rows(architecture, path, requests):
                lines.append(f"| {' | '.join(row)} |")
                wrong |= row[3] != f"{len(requests)}/{len(requests)}" or row[5] != "0"
    text = "\n".join(lines) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
