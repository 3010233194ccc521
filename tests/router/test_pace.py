"""The pace is what was done while something waited, from the first half second on."""

import pytest

from router.pace import Pace


def test_only_what_is_done_while_something_waits_counts() -> None:
    pace = Pace()
    pace.take(1000, 0.0)
    pace.watch(1.0, waiting=True)
    assert pace.per_s is None
    for tick in range(1, 31):
        pace.take(50, 1.0 + tick / 10)
    assert pace.per_s == pytest.approx(500, rel=0.05)
    pace.watch(4.0, waiting=False)
    pace.take(10**9, 5.0)
    assert pace.per_s == pytest.approx(500, rel=0.05)
    pace.watch(100.0, waiting=True)
    assert pace.per_s == pytest.approx(500, rel=0.05)


def test_the_pace_of_late_replaces_an_older_one() -> None:
    pace = Pace()
    pace.watch(0.0, waiting=True)
    for tick in range(1, 101):
        pace.take(50, tick / 10)
    for tick in range(1, 601):
        pace.take(10, 10.0 + tick / 10)
    assert pace.per_s == pytest.approx(100, rel=0.05)
