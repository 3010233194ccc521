"""Ranks are numbered lane by lane, and layouts that cannot be are refused by name."""

import pytest

from shards.mesh import Layout, Place, dp_groups, tp_groups


def test_ranks_are_numbered_lane_by_lane() -> None:
    layout = Layout(tp=2, dp=3)
    places = [Place(layout=layout, rank=r) for r in range(layout.world)]
    assert [(p.dp_rank, p.tp_rank) for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [p.is_lane_leader for p in places] == [True, False] * 3


def test_groups_hold_every_rank_once_in_each_direction() -> None:
    layout = Layout(tp=2, dp=2)
    assert tp_groups(layout) == [[0, 1], [2, 3]]
    assert dp_groups(layout) == [[0, 2], [1, 3]]
    assert tp_groups(Layout()) == dp_groups(Layout()) == [[0]]


def test_a_ranks_groups_are_found_by_its_place() -> None:
    layout = Layout(tp=3, dp=2)
    for rank in range(6):
        place = Place(layout=layout, rank=rank)
        assert rank in tp_groups(layout)[place.dp_rank]
        assert rank in dp_groups(layout)[place.tp_rank]


@pytest.mark.parametrize("name", ["tp", "dp", "ep"])
def test_an_axis_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Layout(**{name: 0})


def test_experts_are_sliced_or_spread_over_all_ranks() -> None:
    assert Layout(tp=2, dp=2, ep=4).world == 4
    with pytest.raises(ValueError, match=r"ep=2 with tp=2 dp=2: ep must be 1 or tp x dp = 4"):
        Layout(tp=2, dp=2, ep=2)


def test_a_rank_outside_of_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.3, got 4"):
        Place(layout=Layout(tp=4), rank=4)
