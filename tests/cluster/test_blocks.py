"""Blocks are shared by hash, kept while free, and given up least recently used first."""

import pytest

from cluster.blocks import BlockPool


def take(pool: BlockPool, count: int, *, keep: int = 0) -> list[int]:
    taken = pool.allocate(count, keep=keep)
    assert taken is not None
    return taken


def filled(pool: BlockPool, *hashes: int) -> list[int]:
    """Blocks held by one owner and findable by these hashes."""
    blocks = take(pool, len(hashes))
    for block, value in zip(blocks, hashes, strict=True):
        pool.register(block, value)
    return blocks


def test_all_blocks_can_be_taken_and_not_one_more() -> None:
    pool = BlockPool(3, list[int]().append)
    assert sorted(take(pool, 3)) == [0, 1, 2]
    assert pool.allocate(1) is None
    assert pool.num_free == 0


def test_room_that_must_stay_free_is_not_given_out() -> None:
    pool = BlockPool(3, list[int]().append)
    assert pool.allocate(2, keep=2) is None
    assert len(take(pool, 2, keep=1)) == 2


def test_a_freed_prefix_is_found_again_up_to_the_first_unknown_block() -> None:
    pool = BlockPool(4, list[int]().append)
    blocks = filled(pool, 10, 11)
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.find([10, 11, 12]) == blocks
    assert pool.find([12, 10]) == []


def test_shared_blocks_are_free_only_when_the_last_owner_lets_go() -> None:
    pool = BlockPool(2, list[int]().append)
    blocks = filled(pool, 10)
    pool.share(blocks)
    pool.release(blocks)
    pool.check_integrity([blocks])
    assert pool.num_free == 1
    pool.release(blocks)
    pool.check_integrity([])
    assert pool.num_free == 2


def test_blank_blocks_go_first_and_then_the_end_of_the_oldest_prefix() -> None:
    pool = BlockPool(5, list[int]().append)
    old, new = filled(pool, 10, 11), filled(pool, 20, 21)
    pool.release(old)
    pool.release(new)
    take(pool, 1)
    assert pool.find([10, 11]) == old
    take(pool, 1)
    assert pool.find([10, 11]) == old[:1]
    assert pool.find([20, 21]) == new


def test_a_prefix_in_use_is_never_forgotten() -> None:
    pool = BlockPool(3, list[int]().append)
    blocks = filled(pool, 10)
    pool.release(blocks)
    pool.share(blocks)
    take(pool, 2)
    assert pool.allocate(1) is None
    assert pool.find([10]) == blocks


def test_a_second_block_of_the_same_content_stays_unnamed() -> None:
    pool = BlockPool(2, list[int]().append)
    first, second = filled(pool, 10), filled(pool, 10)
    assert pool.find([10]) == first
    pool.release(second)
    pool.check_integrity([first])


def test_what_became_findable_or_was_forgotten_is_told_once() -> None:
    pool = BlockPool(3, list[int]().append)
    pool.release(filled(pool, 10, 11, 12))
    assert pool.take_changes() == {10: True, 11: True, 12: True}
    take(pool, 1)
    assert pool.take_changes() == {12: False}
    assert pool.take_changes() == {}


def test_integrity_names_a_block_that_is_held_by_nobody() -> None:
    pool = BlockPool(2, list[int]().append)
    blocks = take(pool, 1)
    with pytest.raises(AssertionError, match=f"block {blocks[0]}: 1 references, 0 owners"):
        pool.check_integrity([])


def test_integrity_names_a_block_that_was_freed_twice() -> None:
    pool = BlockPool(2, list[int]().append)
    blocks = take(pool, 1)
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="blank twice"):
        pool.check_integrity([])


def test_blocks_that_are_written_to_have_one_owner_and_cannot_be_found() -> None:
    pool = BlockPool(3, list[int]().append)
    fresh, known = take(pool, 1), filled(pool, 10)
    pool.check_private(fresh)
    with pytest.raises(AssertionError, match=f"block {known[0]} is written to and can be found"):
        pool.check_private(known)
    pool.share(known)
    with pytest.raises(AssertionError, match=f"block {known[0]} is written to and has 2 owners"):
        pool.check_private(known)
