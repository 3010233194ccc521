import mmap
import os
import time
from collections.abc import Callable

import pytest
import torch

from shards.cache import ALIGNMENT_BYTES, KvCache, cache_shape, fit
from shards.config import ModelConfig
from tests.support.model_configs import make_moe_config, make_next_config


def fit_float32(
    config: ModelConfig, *, memory_bytes: int, max_rows: int, tp: int = 1, checkpoint_share: float = 0.0
) -> tuple[int, int]:
    room = fit(
        config,
        tp,
        memory_bytes=memory_bytes,
        block_size=16,
        dtype=torch.float32,
        max_rows=max_rows,
        checkpoint_share=checkpoint_share,
    )
    return room.num_blocks, room.num_slots


def test_every_array_has_its_own_aligned_place_in_the_buffer() -> None:
    shape = cache_shape(make_next_config(), 2, 1, num_blocks=5, block_size=16, num_slots=3, dtype=torch.bfloat16)

    pools = [*shape.k_pools, *shape.v_pools, *shape.conv_states, *shape.delta_states]
    assert [pool.shape for pool in shape.k_pools] == [(5, 1, 16, 16)]
    assert [pool.shape for pool in shape.conv_states] == [(3, 2 * 2 * 8 + 4 * 12, 3)] * 3
    assert [pool.shape for pool in shape.delta_states] == [(3, 4, 8, 12)] * 3
    assert {pool.dtype for pool in shape.delta_states} == {torch.float32}
    assert all(pool.offset_bytes % ALIGNMENT_BYTES == 0 for pool in pools)
    ends = [pool.offset_bytes + pool.num_bytes for pool in pools]
    assert all(end <= pool.offset_bytes for end, pool in zip(ends, pools[1:], strict=False))
    assert ends[-1] <= shape.total_bytes
    assert shape.bytes_per_block == 2 * 16 * 16 * 2
    assert shape.bytes_per_slot == 3 * (80 * 3 * 2 + 4 * 8 * 12 * 4)


@pytest.mark.parametrize(("tp", "held"), [(1, [(0, 2)]), (2, [(0, 1), (1, 2)]), (4, [(0, 1), (0, 1), (1, 2), (1, 2)])])
def test_kv_heads_are_cut_over_tp_and_shared_by_neighbours_when_tp_is_larger(
    tp: int, held: list[tuple[int, int]]
) -> None:
    shapes = [
        cache_shape(make_moe_config(), tp, t, num_blocks=1, block_size=16, num_slots=0, dtype=torch.float32)
        for t in range(tp)
    ]

    assert [(shape.kv_heads.start, shape.kv_heads.stop) for shape in shapes] == held


def test_another_process_can_map_what_the_cache_holds() -> None:
    shape = cache_shape(make_moe_config(), 1, 0, num_blocks=2, block_size=16, num_slots=0, dtype=torch.float32)
    cache = KvCache(shape, "cpu")
    cache.v_pools[3][1, 1, 15, 15] = 7.0

    with open(f"/proc/self/fd/{cache.fd}", "r+b") as file, mmap.mmap(file.fileno(), shape.total_bytes) as mapped:
        last = shape.v_pools[3].offset_bytes + shape.v_pools[3].num_bytes
        value = torch.frombuffer(bytearray(mapped[last - 4 : last]), dtype=torch.float32)

    assert value.item() == 7.0
    assert cache.k_pools[0].count_nonzero() == 0
    cache.close()
    assert cache.fd == -1
    cache.close()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "still not so after 20 s"
        time.sleep(0.005)


def test_pages_of_the_whole_cache_are_made_beside_other_work_and_keep_what_is_written() -> None:
    shape = cache_shape(make_moe_config(), 1, 0, num_blocks=4000, block_size=16, num_slots=0, dtype=torch.float32)
    cache = KvCache(shape, "cpu")
    cache.k_pools[0][2, 1, 3] = 7.0

    assert shape.total_bytes > 8 << 20
    until(lambda: os.fstat(cache.fd).st_blocks * 512 >= shape.total_bytes)
    assert cache.k_pools[0].sum() == 7.0 * shape.k_pools[0].shape[-1]
    cache.close()


def test_a_cache_larger_than_the_host_is_refused() -> None:
    shape = cache_shape(make_moe_config(), 1, 0, num_blocks=1 << 34, block_size=16, num_slots=0, dtype=torch.float32)

    with pytest.raises(ValueError, match="kv_memory_bytes"):
        KvCache(shape, "cpu")


@pytest.mark.parametrize("config", [make_moe_config(), make_next_config()])
def test_what_fit_answers_fits_and_one_block_more_does_not(config: ModelConfig) -> None:
    memory = 1 << 18
    room = fit(config, 2, memory_bytes=memory, block_size=16, dtype=torch.float32, max_rows=8, checkpoint_share=0)
    blocks, slots = room.num_blocks, room.num_slots

    def total(num_blocks: int) -> int:
        return cache_shape(
            config, 2, 0, num_blocks=num_blocks, block_size=16, num_slots=slots, dtype=torch.float32
        ).total_bytes

    assert slots == (8 if config.delta_layers else 0)
    assert total(blocks) <= memory < total(blocks + 4)


def test_fit_gives_slots_at_most_half_of_the_memory() -> None:
    blocks, slots = fit_float32(make_next_config(), memory_bytes=90_000, max_rows=64)

    assert 0 < slots < 64
    assert blocks > 1


def test_fit_asks_for_no_more_blocks_than_the_rows_can_use() -> None:
    blocks, _ = fit_float32(make_moe_config(), memory_bytes=1 << 40, max_rows=2, checkpoint_share=0.25)

    assert blocks == 2 * 256 // 16


def test_memory_too_small_for_one_block_is_refused_with_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"kv_memory_bytes=1000 .* give at least \d+"):
        fit(
            make_moe_config(),
            1,
            memory_bytes=1000,
            block_size=16,
            dtype=torch.float32,
            max_rows=2,
            checkpoint_share=0.25,
        )


def test_a_share_of_the_memory_holds_states_that_are_kept() -> None:
    config, memory = make_next_config(), 1 << 20
    slot = cache_shape(config, 1, 0, num_blocks=1, block_size=16, num_slots=1, dtype=torch.float32).bytes_per_slot

    blocks, slots = fit_float32(config, memory_bytes=memory, max_rows=8, checkpoint_share=0.25)

    assert 8 + memory // 4 // slot - 1 <= slots <= 8 + memory // 4 // slot
    assert fit_float32(make_moe_config(), memory_bytes=memory, max_rows=8, checkpoint_share=0.25)[1] == 0
    # The least that works has one state to keep, one to run, and one block.
    least = next(size for size in range(0, memory, 64) if _fits(config, size))
    assert fit_float32(config, memory_bytes=least, max_rows=8, checkpoint_share=0.01)[1] == 2
    assert blocks > 1


def _fits(config: ModelConfig, memory_bytes: int) -> bool:
    try:
        fit_float32(config, memory_bytes=memory_bytes, max_rows=8, checkpoint_share=0.01)
    except ValueError as error:
        assert "prefix_cache off" in str(error)  # noqa: PT017 (any size too small must say so)
        return False
    return True


def test_states_are_copied_whole_from_slot_to_slot() -> None:
    shape = cache_shape(make_next_config(), 1, 0, num_blocks=1, block_size=16, num_slots=4, dtype=torch.bfloat16)
    cache = KvCache(shape, "cpu")
    pools = [*cache.conv_states, *cache.delta_states]
    for pool in pools:
        pool.copy_(torch.arange(4.0).view(-1, *[1] * (pool.dim() - 1)).expand(pool.shape))

    cache.keep_states([], [])
    cache.restore_states([], [])
    cache.keep_states([0], [3])
    cache.restore_states([2], [1])

    assert [pool.flatten(1).unique(dim=1).flatten().tolist() for pool in pools] == [[0.0, 2.0, 2.0, 0.0]] * len(pools)
    cache.close()


def test_states_kept_in_int8_lie_behind_all_else_and_fit_at_their_real_size() -> None:
    config, memory = make_next_config(), 1 << 20
    geometry = {"num_blocks": 5, "block_size": 16, "num_slots": 3, "dtype": torch.bfloat16}
    shape, plain = (cache_shape(config, 2, 1, **geometry, num_int8=count) for count in (4, 0))
    assert shape.delta_states == plain.delta_states
    assert shape.int8_convs[0].offset_bytes == plain.total_bytes
    assert [pool.shape for pool in shape.int8_deltas] == [(4, 4, 8, 12)] * 3
    assert [pool.shape for pool in shape.int8_scales] == [(4, 4, 8)] * 3
    assert shape.bytes_per_int8 == 3 * (80 * 3 * 2 + 4 * 8 * 12 + 4 * 8 * 4)
    room = fit(
        config, 1, memory_bytes=memory, block_size=16, dtype=torch.float32, max_rows=8, checkpoint_share=0.5, int8=True
    )
    whole = cache_shape(
        config,
        1,
        0,
        num_blocks=room.num_blocks,
        block_size=16,
        num_slots=room.num_slots,
        num_int8=room.num_int8,
        dtype=torch.float32,
    )
    assert 0.9 * memory / 2 < room.num_int8 * whole.bytes_per_int8 <= memory / 2
    assert 0.9 * memory < whole.total_bytes <= memory
