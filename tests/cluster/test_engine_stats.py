"""Counters are copies to whoever reads them."""

from dataclasses import asdict, replace

from cluster.engine_stats import EngineStats


def test_counters_begin_at_zero_and_a_copy_stays_as_it_was() -> None:
    stats = EngineStats()
    copy = replace(stats)
    stats.steps += 1
    assert not any(asdict(copy).values())
