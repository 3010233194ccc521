"""Greedy tokens against transformers in float32, over layouts, chunk sizes, batching, cache hits and preemption."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from router.request import TokenEvent
from shards.mesh import Layout
from tests.support.exactness import Reference
from tests.support.exactness_matrix import (
    ARCHITECTURES,
    CASES,
    FEW_CASES,
    Case,
    Row,
    check_rows,
    describe,
    layouts,
    run_matrix,
)
from tests.support.reference import make_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One architecture's checkpoint, its reference, and what one rank makes of the prompts."""

    folder: Path
    reference: Reference
    rows: list[Row]
    events: list[list[TokenEvent]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    found: dict[str, Known] = {}

    def get(architecture: str) -> Known:
        if architecture not in found:
            folder = tmp_path_factory.mktemp(architecture)
            reference = Reference.of(make_reference(folder, architecture))
            rows, events = run_matrix(architecture, folder, reference, Layout(), CASES)
            found[architecture] = Known(folder=folder, reference=reference, rows=rows, events=events)
        return found[architecture]

    return get


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_rank_says_what_transformers_says_however_requests_are_served(
    architecture: str, known: Callable[[str], Known]
) -> None:
    check_rows(known(architecture).rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [(name, layout) for name in ARCHITECTURES for layout in layouts(name)],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_every_layout_says_what_transformers_says_with_the_bits_of_one_rank(
    architecture: str, layout: Layout, known: Callable[[str], Known]
) -> None:
    base = known(architecture)
    cases: tuple[Case, ...] = CASES if layout.world == 2 else FEW_CASES
    rows, _ = run_matrix(architecture, base.folder, base.reference, layout, cases, baseline=base.events)
    check_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "layout"),
    [(name, Layout()) for name in ARCHITECTURES]
    + [(name, Layout(tp=2, ep=2)) for name in ARCHITECTURES if Layout(tp=2, ep=2) in layouts(name)],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_plain_torch_kernels_say_what_transformers_says(
    architecture: str, layout: Layout, known: Callable[[str], Known]
) -> None:
    base = known(architecture)
    rows, _ = run_matrix(architecture, base.folder, base.reference, layout, FEW_CASES, kernels="torch")
    check_rows(rows, bitwise=False)
