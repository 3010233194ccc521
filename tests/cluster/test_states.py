"""State slots: blank ones go first, then the checkpoint of least worth; what a plan copies from stays."""

import pytest

from cluster.states import StatePool


def kept(pool: StatePool, *hashes: int) -> int:
    """A checkpoint behind the blocks of `hashes` -> its slot."""
    slot = pool.take()
    assert slot is not None
    pool.keep(slot, hashes, 4)
    return slot


def test_slots_are_given_out_once_each() -> None:
    pool = StatePool(2)
    taken = [pool.take(), pool.take(), pool.take()]
    assert taken == [0, 1, None]
    pool.give(1)
    assert pool.take() == 1
    pool.check_integrity([0, 1])


def test_the_deepest_checkpoint_of_a_prefix_is_found() -> None:
    pool = StatePool(4)
    kept(pool, 10)
    kept(pool, 10, 11, 12)
    assert [pool.deepest(hashes) for hashes in ((), (9,), (10, 11), (10, 11, 12, 13))] == [0, 0, 1, 3]
    assert (pool.num_checkpoints, pool.num_free, pool.num_blank) == (2, 4, 2)


def test_a_state_kept_twice_takes_one_slot_and_is_worth_more() -> None:
    pool = StatePool(3)
    first = kept(pool, 10)
    kept(pool, 20)
    kept(pool, 10)
    assert (pool.num_checkpoints, pool.num_blank) == (2, 1)
    assert [pool.take(), pool.take()] == [2, 1]
    assert pool.take() == first


def test_the_one_that_spares_the_fewest_tokens_goes_first() -> None:
    pool = StatePool(3)
    kept(pool, 10, 11, 12)
    short = kept(pool, 20)
    kept(pool, 30, 31)
    assert pool.take() == short
    assert pool.num_evicted == 1
    assert pool.deepest([20]) == 0


def test_of_equal_ones_the_one_used_longest_ago_goes_first_and_use_makes_younger() -> None:
    pool = StatePool(3)
    first, second, third = kept(pool, 10), kept(pool, 20), kept(pool, 30)
    pool.lend(10)
    pool.end_loans()
    assert [pool.take(), pool.take(), pool.take()] == [second, third, first]


def test_a_long_prefix_is_thinned_out_evenly() -> None:
    pool = StatePool(4)
    hashes = list(range(100, 108))
    for depth in (2, 4, 6, 8):
        kept(pool, *hashes[:depth])
    pool.take()
    pool.take()
    assert [depth for depth in range(1, 9) if pool.deepest(hashes[:depth]) == depth] == [4, 8]
    pool.check_integrity([0, 2])


def test_what_was_popular_goes_in_the_end() -> None:
    pool = StatePool(2)
    popular = kept(pool, 10)
    for _ in range(1000):
        pool.lend(10)
        pool.end_loans()
    slots = [kept(pool, 20 + i) for i in range(40)]
    assert popular in slots
    pool.check_integrity([])


def test_lent_checkpoints_are_not_given_out_until_the_plan_is_complete() -> None:
    pool = StatePool(2)
    lent, other = kept(pool, 10), kept(pool, 20, 21)
    assert not pool.is_last_ready(10)
    assert pool.lend(10) == lent
    assert pool.num_ready == 1
    assert pool.is_last_ready(21)
    assert pool.take() == other
    assert not pool.is_last_ready(10)
    assert pool.take() is None
    pool.end_loans()
    assert pool.take() == lent


def test_the_last_slot_is_taken_over_with_its_state() -> None:
    pool = StatePool(1)
    slot = kept(pool, 10)
    assert pool.is_last_ready(10)
    assert pool.take_over(10) == slot
    assert pool.deepest([10]) == 0
    pool.check_integrity([slot])


def test_a_later_state_replaces_an_earlier_one_unless_that_was_used() -> None:
    pool = StatePool(3)
    kept(pool, 10)
    kept(pool, 20)
    pool.lend(20)
    pool.end_loans()
    for value in (10, 20, 30):
        pool.replace(value)
    assert [pool.deepest([10]), pool.deepest([20])] == [0, 1]
    assert pool.num_evicted == 0


def test_a_state_whose_block_is_gone_is_forgotten() -> None:
    pool = StatePool(3)
    for hashes in ((10,), (10, 11), (10, 11, 12)):
        kept(pool, *hashes)
    pool.forget(11)
    pool.forget(99)
    assert (pool.num_checkpoints, pool.num_blank) == (2, 1)
    assert pool.deepest([10, 11]) == 1
    pool.check_integrity([])


def test_what_was_kept_or_given_up_is_told_once() -> None:
    pool = StatePool(2)
    kept(pool, 10)
    kept(pool, 20)
    assert pool.take_changes() == {10: True, 20: True}
    pool.take()
    pool.forget(20)
    assert pool.take_changes() == {10: False, 20: False}
    assert pool.take_changes() == {}


def test_integrity_notices_a_slot_that_is_lost_held_twice_or_still_lent() -> None:
    pool = StatePool(2)
    kept(pool, 10)
    with pytest.raises(AssertionError, match="slots blank"):
        pool.check_integrity([0])
    pool.lend(10)
    with pytest.raises(AssertionError, match="lent to no plan"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="while a plan copies it"):
        pool.forget(10)
