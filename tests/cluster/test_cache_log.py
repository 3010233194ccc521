"""Readers of a cache log end up with what the cache holds, wherever they begin."""

import random

from cluster.cache_log import CacheChanges, CacheLog
from router.load import CacheEvents


def apply(held: set[int], events: list[CacheEvents]) -> int | None:
    for each in events:
        if each.cleared:
            held.clear()
        held.difference_update(each.removed)
        held.update(each.stored)
    return events[-1].sequence if events else None


def test_a_reader_that_is_up_to_date_gets_nothing_and_a_new_one_a_snapshot() -> None:
    log = CacheLog()
    log.record([CacheChanges()])
    assert log.since(0) == []
    assert [events.cleared for events in log.since(None)] == [True]
    log.record([CacheChanges(kv={1: True}, states={1: True})])
    assert [(e.after, e.sequence, e.stored, e.stored_states) for e in log.since(0)] == [(0, 1, (1,), (1,))]
    assert [(e.cleared, e.stored, e.stored_states) for e in log.since(None)] == [
        (True, (), ()),
        (False, (1,), ()),
        (False, (), (1,)),
    ]


def test_a_number_that_this_log_never_gave_brings_a_snapshot() -> None:
    assert CacheLog().since(7)[0].cleared


def test_a_block_is_there_while_any_lane_holds_it() -> None:
    log = CacheLog()
    log.record([CacheChanges(kv={1: True}), CacheChanges(kv={1: True})])
    log.record([CacheChanges(kv={1: False}), CacheChanges()])
    assert len(log.since(0)) == 1
    log.record([CacheChanges(), CacheChanges(kv={1: False, 9: False})])
    assert log.since(1)[0].removed == (1,)


def test_readers_of_any_pace_agree_and_the_log_is_bounded() -> None:
    rng = random.Random(3)
    log = CacheLog(max_hashes=40, page_hashes=7)
    truth: set[int] = set()
    readers: dict[int, tuple[set[int], int | None]] = {pace: (set(), None) for pace in (1, 3, 50)}
    for step in range(1, 301):
        changes = {rng.randrange(60): rng.random() < 0.6 for _ in range(rng.randrange(6))}
        log.record([CacheChanges(kv=changes)])
        for value, present in changes.items():
            (truth.add if present else truth.discard)(value)
        for pace, (held, sequence) in readers.items():
            if step % pace == 0:
                told = log.since(sequence)
                assert sum(len(each.stored) + len(each.removed) for each in told) <= 60
                readers[pace] = (held, apply(held, told) if told else sequence)
                assert held == truth
