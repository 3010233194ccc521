"""Paged attention in Triton: one kernel for decode and chunked prefill.

T queries, S sequences, H query heads over G KV heads, D head dim, P block size.

Keys are summed over in ranges of RANGE positions from a sequence's first, and the ranges then in ascending order,
whether one program walks them all (long prompts) or each has a program (few queries of long contexts; FlashDecoding:
Dao and others, 2023). So a query's bits follow from its own keys.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from shards.kernels.triton_segments import dot, find_segment, launch, num_tiles, precision

RANGE = 256
"""Keys of a range; shorter ones cost more in the second pass than more programs win."""
_ENOUGH_PROGRAMS = 512
"""Fill a large GPU (132 processors on an H100) a few times over."""
_MOST_PART_BYTES = 128 << 20
"""Of memory for the ranges' results."""
_ROWS = 64
"""Of a tile, queries times heads that share keys: as few as the widest tensor core instructions take."""


@triton.jit
def _add_range(
    most: tl.tensor, total: tl.tensor, values: tl.tensor, lse: tl.tensor, part: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One more range for some rows: its normed values, and the log of its sum of exponentials (-inf: no key)."""
    higher = tl.maximum(most, lse)
    # A row without a key so far: -inf less -inf would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    rescale, weight = tl.exp(most - base), tl.exp(lse - base)
    return higher, total * rescale + weight, values * rescale[:, None] + part * weight[:, None]


@triton.jit
def _attend_range(
    q: tl.tensor,
    position: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rows of queries over keys begin .. end - 1: the log of the sum of exponentials (-inf: no key), normed values."""
    d = tl.arange(0, BD)
    most = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    values = tl.zeros((BR, BD), tl.float32)
    for start in tl.range(begin, end, BN):
        key = start + tl.arange(0, BN)
        block = tl.load(table_ptr + key // P, mask=key < end, other=0).to(tl.int64)
        places = ((block * G + head) * P + key % P) * D
        k_mask, v_mask = (key < end)[None, :] & (d < D)[:, None], (key < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + places[None, :] + d[:, None], mask=k_mask, other=0.0)
        scores = dot(q, k, tl.zeros((BR, BN), tl.float32), PRECISION) * scale
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, rescale = tl.exp(scores - base[:, None]), tl.exp(most - base)
        v = tl.load(v_ptr + places[:, None] + d[None, :], mask=v_mask, other=0.0)
        values = dot(weights.to(v.dtype), v, values * rescale[:, None], PRECISION)
        total = total * rescale + tl.sum(weights, 1)
        most = higher
    # 1 where there was no key: the row's values are zeros.
    divisor = tl.where(total > 0, total, 1.0)
    return most + tl.log(divisor), values / divisor[:, None]


# Sizes of a step that were constants of a kernel would have it compiled anew in the middle of serving.
@triton.jit(do_not_specialize=["num_sequences", "table_stride", "num_queries"])
def _attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    contexts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    num_sequences: tl.tensor,
    table_stride: tl.tensor,
    num_queries: tl.tensor,
    scale: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    LENGTH: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Queries of one sequence and KV head; rows are queries times the heads that share keys.

    Over all of its keys; or (SPLIT) over one range of LENGTH, with the log of its sum of exponentials (-inf: no key).
    """
    s, first, end = find_segment(starts_ptr, num_sequences, tl.program_id(0), BQ)
    if first < end:
        head = tl.program_id(1)
        row = tl.arange(0, BR)
        query, q_head = first + row // (H // G), head * (H // G) + row % (H // G)
        held = (row < BQ * (H // G)) & (query < end)
        d = tl.arange(0, BD)
        context, table = tl.load(contexts_ptr + s), tables_ptr + s * table_stride
        position = context - end + query
        # No query of this tile sees a key from here on.
        seen = context - end + tl.minimum(first + BQ, end)
        places = query * H + q_head
        inside = held[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + places[:, None] * D + d[None, :], mask=inside, other=0.0)
        most = tl.full((BR,), float("-inf"), tl.float32)
        total = tl.zeros((BR,), tl.float32)
        values = tl.zeros((BR, BD), tl.float32)
        begin = tl.program_id(2) * LENGTH
        until = tl.minimum(begin + LENGTH, seen) if SPLIT else seen
        for range_start in tl.range(begin, until, LENGTH):
            range_end = tl.minimum(range_start + LENGTH, seen)
            lse, part = _attend_range(
                q, position, k_ptr, v_ptr, table, head, range_start, range_end, scale, G, P, D, BD, BR, BN, PRECISION
            )
            most, total, values = _add_range(most, total, values, lse, part)
        if SPLIT:
            # One range at most: `values` are its own, and `most` is the log of its sum.
            places += tl.program_id(2) * num_queries * H
            tl.store(lse_ptr + places, most, mask=held)
        else:
            values = values / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + places[:, None] * D + d[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _merge(
    parts_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_parts: tl.tensor,
    gate_stride_t: tl.tensor,
    gate_stride_h: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    """One query and head: its ranges (else the one part) summed in ascending order, times sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    d = tl.arange(0, BD)
    inside = (d < D)[None, :]
    if SPLIT:
        most = tl.full((1,), float("-inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        value = tl.zeros((1, BD), tl.float32)
        for i in tl.range(num_parts):
            lse = tl.load(lse_ptr + i * num_rows + row)
            place = (i * num_rows + row) * D
            # A range without keys adds nothing, and may be one that no program wrote.
            there = inside & (lse > float("-inf"))[:, None]
            part = tl.load(parts_ptr + place[:, None] + d[None, :], mask=there, other=0.0)
            most, total, value = _add_range(most, total, value, lse, part)
        value = value / tl.where(total > 0, total, 1.0)[:, None]
    else:
        value = tl.load(parts_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    if GATED:
        place = (row // H) * gate_stride_t + (row % H) * gate_stride_h
        gate = tl.load(gate_ptr + place[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        value = value * tl.sigmoid(gate)
    tl.store(out_ptr + row[:, None] * D + d[None, :], value, mask=inside)


def attention(
    q_THD: Tensor,
    k_pool_NGPD: Tensor,
    v_pool_NGPD: Tensor,
    tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
    gate_THD: Tensor | None,
) -> Tensor:
    """`Kernels.attention`; the plan follows from shapes alone, so that nothing waits for the device."""
    (T, H, D), (_, G, P, _), (S, B) = q_THD.shape, k_pool_NGPD.shape, tables_SB.shape
    out_THD = torch.empty_like(q_THD)
    if not T:
        return out_THD
    share, device, BD = H // G, q_THD.device, max(16, triton.next_power_of_2(D))
    BQ, BR = max(1, _ROWS // share), max(_ROWS, triton.next_power_of_2(share))
    if T == S:
        # A row a sequence: a tile has one however many it could have.
        BQ = 1
    BN, warps = (64, 4) if BD <= 128 else (32, 8)
    tiles = num_tiles(T, S, BQ)
    ranges = triton.cdiv(B * P, RANGE)
    split = should_split(tiles * G, ranges, q_THD.numel())
    gated = gate_THD is not None
    parts = out_THD
    if split or gated:
        parts = torch.empty(ranges if split else 1, T, H, D, dtype=torch.float32, device=device)
    lse = torch.full((ranges, T, H), float("-inf"), device=device) if split else parts
    inputs = (q_THD, k_pool_NGPD, v_pool_NGPD, tables_SB, query_start_S1, context_lens_S, parts, lse)
    sizes = (S, tables_SB.stride(0), T, scale, H, G, P, D, BD, BQ, BR, BN, RANGE, split, precision(q_THD))
    launch(_attend, (tiles, G, ranges if split else 1), *inputs, *sizes, warps=warps)
    if split or gated:
        strides = (0, 0) if gate_THD is None else gate_THD.stride()[:2]
        gate = out_THD if gate_THD is None else gate_THD
        launch(_merge, (T * H,), parts, lse, gate, out_THD, T * H, ranges, *strides, H, D, BD, split, gated)
    return out_THD


def should_split(programs: int, ranges: int, query_elements: int) -> bool:
    """Whether each range of keys gets programs of its own: where the device would idle, and memory allows it.

    Args:
        programs: those that would walk all ranges.
        ranges: of the longest context that the block tables have room for.
        query_elements: T * H * D.
    """
    return ranges > 1 and programs < _ENOUGH_PROGRAMS and 4 * ranges * query_elements <= _MOST_PART_BYTES
