"""Where a prompt's state is kept: at its end, at the end of what it shares, and on a grid that widens."""

from dataclasses import replace

import pytest

from cluster.checkpoints import checkpoint_ends
from tests.support.scheduler_bench import CONFIG

LONG = replace(CONFIG, num_slots=68, max_model_len=4096, state_spacing=16)


@pytest.mark.parametrize(("length", "ends"), [(1, []), (4, []), (5, [4]), (8, [4]), (13, [12])])
def test_a_short_prompt_keeps_its_last_block_boundary_that_leaves_a_token_to_compute(
    length: int, ends: list[int]
) -> None:
    assert checkpoint_ends(LONG, first=0, shared=0, length=length, blank=0) == ends


def test_the_grid_widens_with_the_distance_from_the_start() -> None:
    wide = replace(LONG, max_model_len=1 << 20)
    assert checkpoint_ends(wide, first=0, shared=0, length=500, blank=0) == [16, 32, 64, 128, 256, 496]


def test_the_grid_stops_widening_where_a_full_prompt_fills_half_of_the_slots() -> None:
    ends = checkpoint_ends(LONG, first=0, shared=0, length=4096, blank=0)
    assert ends[-3:] == [3840, 3968, 4092]
    assert len(ends) <= 32 + 4


def test_the_end_of_what_was_known_is_kept_and_nothing_close_to_it() -> None:
    assert checkpoint_ends(LONG, first=16, shared=40, length=100, blank=0) == [40, 64, 96]
    assert checkpoint_ends(LONG, first=60, shared=60, length=100, blank=0) == [96]


def test_grid_positions_are_rounded_down_to_blocks() -> None:
    odd = replace(LONG, block_size=7, state_spacing=10)
    assert checkpoint_ends(odd, first=0, shared=0, length=60, blank=0) == [14, 35, 56]


def test_without_slots_to_spare_the_grid_is_as_wide_as_it_can_be() -> None:
    tight = replace(LONG, num_slots=4)
    assert checkpoint_ends(tight, first=0, shared=0, length=100, blank=0) == [16, 32, 64, 96]


def test_with_ample_room_the_grid_begins_with_the_first_block() -> None:
    config = replace(LONG, max_model_len=1 << 20, state_spacing=64)
    assert checkpoint_ends(config, first=0, shared=0, length=50, blank=64) == [4, 8, 16, 32, 48]
    assert checkpoint_ends(config, first=0, shared=0, length=200, blank=64) == [4, 8, 16, 32, 64, 128, 196]
    assert checkpoint_ends(config, first=32, shared=44, length=100, blank=64) == [44, 64, 96]


@pytest.mark.parametrize("length", [5, 63, 700, 4000])
def test_with_ample_room_at_least_half_of_any_prefix_is_found_the_second_time(length: int) -> None:
    config = replace(LONG, max_model_len=1 << 20, state_spacing=64)
    ends = checkpoint_ends(config, first=0, shared=0, length=length, blank=64)
    for prefix in range(config.block_size, length, config.block_size):
        assert 2 * max(end for end in ends if end <= prefix) >= prefix
