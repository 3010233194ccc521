"""The index tells what a walk over every member's own set of blocks would tell."""

import random

from router.prefix_index import PrefixIndex


def make_index(*held: tuple[int, ...]) -> PrefixIndex:
    index = PrefixIndex(max_expected=100)
    for member, hashes in enumerate(held):
        index.store(member, hashes, ())
    return index


def test_each_holder_is_told_once_with_its_depth_and_the_deepest_first() -> None:
    index = make_index((1, 2, 3, 4), (1, 2), (9,), (1, 2, 3, 4))
    assert index.depths([1, 2, 3, 4, 5]) == [(4, 0b1001), (2, 0b0010)]
    assert index.depths([1, 2]) == [(2, 0b1011)]
    assert index.depths([7]) == []
    assert index.depths([]) == []


def test_random_prefixes_of_many_members_are_found_as_by_walking() -> None:
    rng = random.Random(1)
    hashes = list(range(100, 140))
    for _ in range(200):
        held = [tuple(hashes[: rng.randrange(41)]) for _ in range(20)]
        index = make_index(*held)
        found = {
            member: depth for depth, members in index.depths(hashes) for member in range(20) if members >> member & 1
        }
        assert found == {member: len(blocks) for member, blocks in enumerate(held) if blocks}


def test_what_was_routed_before_is_no_more_than_a_first_place_to_look_at() -> None:
    rng = random.Random(2)
    hashes = list(range(100, 140))
    for _ in range(200):
        held = [tuple(hashes[: rng.randrange(41)]) for _ in range(20)]
        index = make_index(*held)
        # To one more member, that holds nothing yet.
        routed = rng.randrange(1, 41)
        index.expect((20,), [*hashes[:routed], 7], 1.0)
        found = {
            member: depth for depth, members in index.depths(hashes) for member in range(21) if members >> member & 1
        }
        assert found == {member: len(blocks) for member, blocks in enumerate(held) if blocks} | {20: routed}


def test_removed_and_cleared_blocks_are_gone_and_unknown_ones_no_error() -> None:
    index = make_index((1, 2, 3), (1, 2))
    index.remove(0, (3, 77), (5,))
    assert index.depths([1, 2, 3]) == [(2, 0b11)]
    index.clear(0)
    index.clear(0)
    assert index.depths([1, 2, 3]) == [(2, 0b10)]
    index.clear(1)
    assert len(index) == 0


def test_expected_blocks_count_until_their_time_or_until_the_member_leaves() -> None:
    index = make_index((1,))
    index.expect((0,), [1, 2, 3], 10.0)
    index.expect((1,), [1, 2], 20.0)
    assert index.depths([1, 2, 3]) == [(3, 0b01), (2, 0b10)]
    index.forget(10.0)
    assert index.depths([1, 2, 3]) == [(2, 0b10), (1, 0b01)]
    index.clear(1)
    assert index.depths([1, 2, 3]) == [(1, 0b01)]


def test_a_member_with_recurrent_state_holds_as_much_as_kv_and_a_state_reach() -> None:
    index = PrefixIndex(max_expected=100)
    index.store(0, (1, 2, 3, 4), (2, 4))
    index.store(1, (1, 2, 3), (1, 2, 4))
    index.store(2, (1, 2), ())
    depths = index.depths([1, 2, 3, 4])
    assert index.state_depths([1, 2, 3, 4], depths) == [(4, 0b001), (2, 0b010)]
    depths = index.depths([1, 2, 3])
    assert index.state_depths([1, 2, 3], depths) == [(2, 0b011)]


def test_a_routed_prompt_is_expected_to_leave_a_state_at_its_end() -> None:
    index = PrefixIndex(max_expected=100)
    index.expect((0,), [1, 2], 10.0)
    assert index.state_depths([1, 2, 3], index.depths([1, 2, 3])) == [(2, 0b1)]
    assert index.state_depths([1], index.depths([1])) == []


def test_a_block_expected_of_two_members_is_expected_of_each_for_its_own_time() -> None:
    index = make_index((), ())
    index.expect((0,), [1, 2, 3], 10.0)
    index.expect((1,), [1, 2, 4], 20.0)
    assert index.depths([1, 2, 3]) == [(3, 0b01), (2, 0b10)]
    index.forget(10.0)
    assert index.depths([1, 2, 3]) == [(2, 0b10)]
    assert index.depths([1, 2, 4]) == [(3, 0b10)]


def test_a_member_that_leaves_takes_only_its_own_expectations_along() -> None:
    index = make_index((), ())
    index.expect((0,), [1, 2], 10.0)
    index.expect((1,), [5, 6], 10.0)
    index.store(1, (), ())
    index.clear(1)
    assert index.depths([1, 2]) == [(2, 0b01)]
    assert index.depths([5, 6]) == []
