"""Writes the exactness matrix as Markdown: `python benchmarks/exactness.py [--out FILE.md]`.

Every model family over every layout and way of serving, then the config variety, each against transformers' full
float32 forward pass. Takes about five minutes on two cores. Exit status 1 when a token is wrong.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

from shards.mesh import Layout
from tests.support.exactness import LOGIT_TIE, ROUTER_TIE, Reference
from tests.support.exactness_matrix import (
    ARCHITECTURES,
    CASES,
    FEW_CASES,
    Row,
    as_markdown,
    describe,
    layouts,
    run_matrix,
    varieties,
)
from tests.support.reference import make_reference


def architecture_rows(architecture: str, folder: Path) -> list[Row]:
    """All layouts of one architecture, bits compared with those of one rank."""
    reference = Reference.of(make_reference(folder, architecture))
    rows, events = run_matrix(architecture, folder, reference, Layout(), CASES)
    for layout in layouts(architecture):
        print(f"{architecture}, {describe(layout)} ..", file=sys.stderr)
        cases = CASES if layout.world == 2 else FEW_CASES
        rows += run_matrix(architecture, folder, reference, layout, cases, baseline=events)[0]
    return rows


def variety_rows(architecture: str, folder: Path) -> list[Row]:
    """Config variety of one architecture on one rank."""
    rows: list[Row] = []
    for number, (variety, changes) in enumerate(varieties(architecture).items()):
        path = folder / str(number)
        reference = Reference.of(make_reference(path, architecture, changes))
        rows += run_matrix(f"{architecture}, {variety}", path, reference, Layout(), FEW_CASES)[0]
    return rows


def main() -> int:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    out: Path | None = parser.parse_args().out
    began = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            rows += architecture_rows(architecture, Path(folder) / architecture)
        for architecture in ARCHITECTURES:
            rows += variety_rows(architecture, Path(folder) / f"{architecture}-variety")
    text = (
        f"8 prompts of 1 to 130 tokens, 64 greedy tokens each, float32, deterministic={rows[0].deterministic}, "
        f"{platform.machine()}, {time.monotonic() - began:.0f} s. Ties: logit margin below {LOGIT_TIE:g} or "
        f"router margin below {ROUTER_TIE:g}.\n\n{as_markdown(rows)}"
    )
    if out is None:
        print(text)
    else:
        out.write_text(text)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
