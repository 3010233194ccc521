"""Bytes named by recut are those that slicing the global tensors names."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from cluster.recut import Fragment, KvMove, check_pair, fragments, recut
from router.errors import HandoffError
from shards.cache import KvCache
from shards.config import ModelConfig
from tests.support.kv_patterns import Geometry, assert_moved, fill, make_global, make_lane, rank_part
from tests.support.model_configs import make_moe_config, make_next_config

MOVE = KvMove(first=0, end=20, src_blocks=(7, 8, 9, 1, 3), dst_blocks=(2, 3, 4, 9, 0))
BLOCKS = tuple(zip(MOVE.src_blocks, MOVE.dst_blocks, strict=True))


def carry(pieces: list[Fragment], sources: Sequence[KvCache], dest: KvCache) -> None:
    """Copy the fragments' bytes in one process."""
    for one in pieces:
        for at, to in zip(one.src.offsets.tolist(), one.dst.offsets.tolist(), strict=True):
            dest.buffer[to : to + one.dst.num_bytes] = sources[one.source].buffer[at : at + one.src.num_bytes]


def move(model: ModelConfig, src: Geometry, dst: Geometry, *, max_bytes: int = 1 << 20) -> int:
    """Carry the fragments out and check every destination rank; returns their number."""
    state = make_global(model, src)
    sources, dests = make_lane(model, src), make_lane(model, dst)
    fill(sources, state)
    slots = (2, 1) if model.delta_layers else None
    count = 0
    for rank, dest in enumerate(dests):
        cuts = recut([cache.shape for cache in sources], dest.shape, rank)
        pieces = fragments(cuts, MOVE, slots, max_bytes=max_bytes)
        assert all(one.src.total_bytes == one.dst.total_bytes <= max_bytes for one in pieces)
        count += len(pieces)
        carry(pieces, sources, dest)
    assert_moved(dests, state, BLOCKS, slots)
    return count


@pytest.mark.parametrize("make_config", [make_moe_config, make_next_config])
@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (2, 2), (1, 2), (2, 1), (4, 1), (1, 4), (4, 2), (2, 4), (4, 4)])
def test_every_rank_gets_its_heads_and_states_from_any_tp_to_any_tp(
    make_config: Callable[[], ModelConfig], src_tp: int, dst_tp: int
) -> None:
    move(make_config(), Geometry(tp=src_tp), Geometry(tp=dst_tp, num_blocks=10, num_slots=2))


def test_bfloat16_and_tp_that_does_not_divide_the_other_side() -> None:
    model = make_next_config(
        num_key_value_heads=6, num_attention_heads=12, linear_num_key_heads=6, linear_num_value_heads=12
    )
    src = Geometry(tp=3, dtype=torch.bfloat16)
    move(model, src, Geometry(tp=2, dtype=torch.bfloat16))
    move(model, Geometry(tp=2, dtype=torch.bfloat16), src)


def test_all_blocks_of_a_layer_are_rows_of_one_copy() -> None:
    model = make_moe_config()
    assert move(model, Geometry(tp=1), Geometry(tp=1)) == 2 * len(model.attention_layers)


def test_large_copies_are_split_by_rows_and_then_inside_a_row() -> None:
    assert move(make_next_config(), Geometry(tp=2), Geometry(tp=1), max_bytes=100) > 100


def test_destinations_spread_over_replicas_of_a_kv_head() -> None:
    model = make_moe_config()
    sources = [cache.shape for cache in make_lane(model, Geometry(tp=4))]
    dests = [cache.shape for cache in make_lane(model, Geometry(tp=4))]
    used = [
        {one.source for one in fragments(recut(sources, dests[r], r), MOVE, None, max_bytes=1 << 20)} for r in range(4)
    ]
    assert used == [{0}, {1}, {2}, {3}]


def test_a_row_outside_of_a_pool_is_refused() -> None:
    model = make_moe_config()
    shape = make_lane(model, Geometry(tp=1))[0].shape
    cuts = recut([shape], shape, 0)
    with pytest.raises(HandoffError, match="source row 12"):
        fragments(cuts, KvMove(first=0, end=4, src_blocks=(12,), dst_blocks=(0,)), None, max_bytes=1 << 20)
    with pytest.raises(HandoffError, match="destination row -1"):
        fragments(cuts, KvMove(first=0, end=4, src_blocks=(0,), dst_blocks=(-1,)), None, max_bytes=1 << 20)


def test_sources_that_lack_a_head_are_refused() -> None:
    model = make_moe_config()
    half, whole = make_lane(model, Geometry(tp=2))[0].shape, make_lane(model, Geometry(tp=1))[0].shape
    with pytest.raises(HandoffError, match="head 1 is held by none"):
        recut([half], whole, 0)


def test_nothing_to_move_gives_no_copies() -> None:
    shape = make_lane(make_moe_config(), Geometry(tp=1))[0].shape
    nothing = KvMove(first=8, end=8, src_blocks=(1, 2), dst_blocks=())
    assert fragments(recut([shape], shape, 0), nothing, None, max_bytes=1 << 20) == []


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize(("src_size", "dst_size"), [(4, 8), (8, 4), (4, 2), (6, 4), (4, 6)])
@pytest.mark.parametrize("max_bytes", [1 << 20, 48])
def test_positions_arrive_in_blocks_of_another_size(
    src_size: int, dst_size: int, src_tp: int, dst_tp: int, max_bytes: int
) -> None:
    model = make_next_config()
    src, dst = Geometry(tp=src_tp, block_size=src_size), Geometry(tp=dst_tp, block_size=dst_size)
    sources, dests, state = make_lane(model, src), make_lane(model, dst), make_global(model, src)
    fill(sources, state)
    first, end = dst_size, 23
    wanted = KvMove(first=first, end=end, src_blocks=(7, 0, 9, 1, 3, 4), dst_blocks=(2, 5, 1, 8, 0, 3, 7, 6, 9, 4, 10))
    for rank, dest in enumerate(dests):
        cuts = recut([cache.shape for cache in sources], dest.shape, rank)
        carry(fragments(cuts, wanted, (2, 1), max_bytes=max_bytes), sources, dest)
        k, v, _, _ = rank_part(state, dest)
        for pool, part in zip(dest.k_pools + dest.v_pools, k + v, strict=True):
            for at in range(first, end):
                dst_block, src_block = wanted.dst_blocks[(at - first) // dst_size], wanted.src_blocks[at // src_size]
                assert torch.equal(pool[dst_block, :, at % dst_size], part[src_block, :, at % src_size])


@pytest.mark.parametrize("wanted", [{"end": 21}, {"first": 2}, {"dst_blocks": (2, 3)}])
def test_positions_without_blocks_are_refused(wanted: dict[str, object]) -> None:
    shape = make_lane(make_moe_config(), Geometry(tp=1))[0].shape
    bad = dataclasses.replace(MOVE, **wanted)  # type: ignore[arg-type]
    with pytest.raises(HandoffError, match="do not lie in"):
        fragments(recut([shape], shape, 0), bad, None, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", "other"),
        ("dtype", "bfloat16"),
        ("state_dtype", "bfloat16"),
        ("expert_weights", "int4"),
        ("version", 1),
    ],
)
def test_members_that_do_not_fit_are_refused_naming_both_sides(name: str, value: object) -> None:
    ours = Geometry(tp=1).layout(make_moe_config())
    theirs = dataclasses.replace(ours, **{name: value})  # type: ignore[arg-type]
    check_pair(ours, dataclasses.replace(ours, tp=2, num_blocks=3, num_slots=9, block_size=32))
    with pytest.raises(HandoffError, match=f"{name}={value}.*{name}={getattr(ours, name)}"):
        check_pair(theirs, ours)
