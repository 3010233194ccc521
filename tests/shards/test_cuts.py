import pytest

from shards.config import ModelConfig
from shards.cuts import check_layout, largest_groups, make_cuts, token_range, vocab_range
from shards.mesh import Layout, Place
from tests.support.model_configs import make_moe_config, make_next_config


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (make_moe_config(num_attention_heads=6), Layout(tp=4), "num_attention_heads=6 is shared by 4 ranks"),
        (make_moe_config(num_attention_heads=12, num_key_value_heads=4), Layout(tp=6), "num_key_value_heads=4"),
        (make_moe_config(intermediate_size=63), Layout(tp=2), "intermediate_size=63"),
        (make_moe_config(moe_intermediate_size=6), Layout(tp=2, dp=2), "moe_intermediate_size=6"),
        (make_moe_config(num_experts=0), Layout(tp=2, ep=2), "the model has no experts to spread; use ep=1"),
        (make_moe_config(num_experts=6), Layout(tp=2, dp=2, ep=4), "num_experts=6 must be a multiple of ep=4"),
        (make_next_config(linear_num_key_heads=2), Layout(tp=4), "linear_num_key_heads=2"),
        (make_next_config(shared_expert_intermediate_size=6), Layout(dp=4), "shared_expert_intermediate_size=6"),
    ],
)
def test_a_layout_the_shapes_do_not_allow_is_refused_by_name(config: ModelConfig, layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(config, layout, deterministic=False)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2), Layout(tp=4, ep=4)])
@pytest.mark.parametrize("config", [make_moe_config(), make_next_config()])
def test_layouts_that_divide_are_allowed_in_both_modes(config: ModelConfig, layout: Layout) -> None:
    check_layout(config, layout, deterministic=True)
    check_layout(config, layout, deterministic=False)


def test_deterministic_mode_refuses_ranks_that_do_not_hold_whole_parts_of_a_sum() -> None:
    config = make_moe_config(num_attention_heads=6, intermediate_size=66, moe_intermediate_size=66)
    check_layout(config, Layout(tp=2), deterministic=True)
    config = make_moe_config(
        num_attention_heads=6, num_key_value_heads=3, intermediate_size=66, moe_intermediate_size=66
    )
    check_layout(config, Layout(tp=3), deterministic=False)

    with pytest.raises(ValueError, match=r"num_attention_heads=6 .* at most 2 ranks, not 3; .* deterministic=off"):
        check_layout(config, Layout(tp=3), deterministic=True)


def test_reduction_groups_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="reduction_groups=3"):
        check_layout(make_moe_config(), Layout(), deterministic=True, groups=3)


def test_groups_are_the_largest_power_of_two_that_divides() -> None:
    assert [largest_groups(units, 4) for units in (1, 2, 3, 6, 8, 12, 20)] == [1, 2, 1, 2, 4, 4, 4]


@pytest.mark.parametrize(
    ("layout", "expert_columns", "experts"),
    [(Layout(tp=2, dp=2), 8, 8), (Layout(tp=2, dp=2, ep=4), 32, 2), (Layout(tp=2), 16, 8), (Layout(), 32, 8)],
)
def test_ranks_together_hold_every_slice_once(layout: Layout, expert_columns: int, experts: int) -> None:
    config = make_next_config()
    cuts = [make_cuts(config, Place(layout=layout, rank=r), deterministic=True) for r in range(layout.world)]

    lane = cuts[: layout.tp]
    assert [h for c in lane for h in c.heads] == list(range(8))
    assert [h for c in lane for h in c.key_heads] == list(range(4))
    assert [v for c in lane for v in c.vocab] == list(range(131))
    assert {len(c.expert_columns) for c in cuts} == {expert_columns}
    assert {len(c.experts) for c in cuts} == {experts}
    assert sum(len(c.experts) * len(c.expert_columns) for c in cuts) == 8 * 32
    assert {c.head_groups for c in cuts} == {4 // layout.tp}
    assert {c.expert_groups for c in cuts} == {4 * expert_columns // 32}


def test_uneven_vocabulary_and_tokens_leave_the_rest_to_the_last_ranks() -> None:
    assert [len(vocab_range(131, 4, t)) for t in range(4)] == [33, 33, 33, 32]
    assert [len(token_range(5, 4, t)) for t in range(4)] == [2, 2, 1, 0]
