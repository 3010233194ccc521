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
    assert checkpoint_ends(LONG, first=0, shared=0, length=length) == ends


def test_the_grid_widens_with_the_distance_from_the_start() -> None:
    wide = replace(LONG, max_model_len=1 << 20)
    assert checkpoint_ends(wide, first=0, shared=0, length=500) == [16, 32, 64, 128, 256, 496]


def test_the_grid_stops_widening_where_a_full_prompt_fills_half_of_the_slots() -> None:
    ends = checkpoint_ends(LONG, first=0, shared=0, length=4096)
    assert ends[-3:] == [3840, 3968, 4092]
    assert len(ends) <= 32 + 4


def test_the_end_of_what_was_known_is_kept_and_nothing_close_to_it() -> None:
    assert checkpoint_ends(LONG, first=16, shared=40, length=100) == [40, 64, 96]
    assert checkpoint_ends(LONG, first=60, shared=60, length=100) == [96]


def test_grid_positions_are_rounded_down_to_blocks() -> None:
    odd = replace(LONG, block_size=7, state_spacing=10)
    assert checkpoint_ends(odd, first=0, shared=0, length=60) == [14, 35, 56]


def test_without_slots_to_spare_the_grid_is_as_wide_as_it_can_be() -> None:
    tight = replace(LONG, num_slots=4)
    assert checkpoint_ends(tight, first=0, shared=0, length=100) == [16, 32, 64, 96]
