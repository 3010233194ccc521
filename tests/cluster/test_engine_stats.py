"""Counters are copies to whoever reads them."""

from dataclasses import asdict, replace

from cluster.engine_stats import EngineStats


def test_counters_begin_at_zero_and_a_copy_stays_as_it_was() -> None:
    stats = EngineStats()
    copy = replace(stats)
    stats.steps += 1
    assert not any(asdict(copy).values())


def test_what_load_reports_tell_is_what_was_counted() -> None:
    stats = EngineStats(
        preemptions=1,
        drafted_tokens=20,
        accepted_tokens=15,
        pulls=6,
        failed_pulls=2,
        refetched_frames=3,
        pulled_bytes=4,
        pull_s=0.5,
    )
    assert asdict(stats.counts()).items() <= asdict(stats).items()
    assert all(asdict(stats.counts()).values())
