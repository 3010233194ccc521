"""A rank's sequence memory: paged KV of attention layers and state slots of delta layers, in one flat buffer.

On the CPU the buffer is an anonymous memory file, so that another process of the host can map it through
/proc/<pid>/fd/<fd>; the kernel frees it with its last user, whatever way that ends.
"""

import math
import mmap
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.config import ModelConfig
from shards.cuts import even_range, kv_head_range
from shards.first_touch import FirstTouch
from shards.host_memory import available_memory
from shards.states import Int8States, LayerStates
from shards.step_progress import StepProgress

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One array's place in the flat buffer. The first axis counts blocks or slots."""

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one block or slot in this array."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Geometry of one rank's cache: where every array lies and which heads of the model it holds.

    N blocks, H KV heads held here, P block size, D head dim; M slots, C conv channels held here (laid out
    [q | k | v] of the key heads held), W conv width, V value heads held here; J states kept in int8.
    """

    k_pools: tuple[Pool, ...]
    """[N, H, P, D] by attention layer; last, where it is used, the multi-token prediction layer's."""
    v_pools: tuple[Pool, ...]
    conv_states: tuple[Pool, ...]
    """[M, C, W - 1] in the model's dtype, by delta layer."""
    delta_states: tuple[Pool, ...]
    """[M, V, Dk, Dv] in state_dtype, by delta layer."""
    int8_convs: tuple[Pool, ...]
    """[J, C, W - 1] in the model's dtype, by delta layer: of the states kept in int8."""
    int8_deltas: tuple[Pool, ...]
    """[J, V, Dk, Dv] int8, by delta layer."""
    int8_scales: tuple[Pool, ...]
    """[J, V, Dk] float32, by delta layer."""
    kv_heads: range
    """Global KV heads held here."""
    key_heads: range
    """Global key heads of the delta layers held here, each with its value heads."""
    num_blocks: int
    block_size: int
    num_slots: int
    num_int8: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    bytes_per_block: int
    """Over all attention layers, k and v."""
    bytes_per_slot: int
    """Over all delta layers."""
    bytes_per_int8: int
    """As bytes_per_slot, of a state kept in int8."""
    total_bytes: int
    """Size of the flat buffer."""


class _Layouter:
    """Hands out places in the flat buffer, one after the other."""

    def __init__(self) -> None:
        self.end_bytes = 0

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> Pool:
        pool = Pool(offset_bytes=self.end_bytes, shape=shape, dtype=dtype)
        self.end_bytes += -(-pool.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return pool


def cache_shape(
    model: ModelConfig,
    layout_tp: int,
    tp_rank: int,
    *,
    num_blocks: int,
    block_size: int,
    num_slots: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
    num_int8: int = 0,
) -> CacheShape:
    """Geometry of the cache of rank `tp_rank` of `layout_tp`; equal arguments give equal geometry in every process.

    States kept in int8 come last: where the rest lies does not depend on them.
    """
    kv_heads = kv_head_range(model.num_key_value_heads, layout_tp, tp_rank)
    key_heads = even_range(model.linear_num_key_heads, layout_tp, tp_rank) if model.delta_layers else range(0)
    kv_shape = (num_blocks, len(kv_heads), block_size, model.head_dim)
    conv_shape, delta_shape = _state_shapes(model, len(key_heads), num_slots)
    layouter = _Layouter()
    k_pools = tuple(layouter.place(kv_shape, dtype) for _ in range(model.num_kv_layers))
    v_pools = tuple(layouter.place(kv_shape, dtype) for _ in range(model.num_kv_layers))
    conv_states = tuple(layouter.place(conv_shape, dtype) for _ in model.delta_layers)
    delta_states = tuple(layouter.place(delta_shape, state_dtype) for _ in model.delta_layers)
    int8_conv, int8_delta = _state_shapes(model, len(key_heads), num_int8)
    int8_convs = tuple(layouter.place(int8_conv, dtype) for _ in model.delta_layers)
    int8_deltas = tuple(layouter.place(int8_delta, torch.int8) for _ in model.delta_layers)
    int8_scales = tuple(layouter.place(int8_delta[:-1], torch.float32) for _ in model.delta_layers)
    return CacheShape(
        k_pools=k_pools,
        v_pools=v_pools,
        conv_states=conv_states,
        delta_states=delta_states,
        int8_convs=int8_convs,
        int8_deltas=int8_deltas,
        int8_scales=int8_scales,
        kv_heads=kv_heads,
        key_heads=key_heads,
        num_blocks=num_blocks,
        block_size=block_size,
        num_slots=num_slots,
        num_int8=num_int8,
        dtype=dtype,
        state_dtype=state_dtype,
        bytes_per_block=sum(pool.row_bytes for pool in k_pools + v_pools),
        bytes_per_slot=sum(pool.row_bytes for pool in conv_states + delta_states),
        bytes_per_int8=sum(pool.row_bytes for pool in int8_convs + int8_deltas + int8_scales),
        total_bytes=layouter.end_bytes,
    )


def _state_shapes(model: ModelConfig, key_heads: int, num_slots: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one delta layer's conv and delta states for `key_heads` key heads."""
    if not model.delta_layers:
        return (0, 0, 0), (0, 0, 0, 0)
    value_heads = key_heads * model.linear_num_value_heads // model.linear_num_key_heads
    key_dim, value_dim = model.linear_key_head_dim, model.linear_value_head_dim
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    conv = (num_slots, channels, model.linear_conv_kernel_dim - 1)
    return conv, (num_slots, value_heads, key_dim, value_dim)


def unit_shape(
    model: ModelConfig, tp: int, *, block_size: int, dtype: torch.dtype, state_dtype: torch.dtype
) -> CacheShape:
    """A rank's cache of one of each: block, slot and state kept in int8."""
    return cache_shape(
        model,
        tp,
        0,
        num_blocks=1,
        block_size=block_size,
        num_slots=1,
        dtype=dtype,
        state_dtype=state_dtype,
        num_int8=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one rank's memory is cut into."""

    num_blocks: int
    num_slots: int
    """Of running states; of kept ones too, where these are exact."""
    num_int8: int
    """Of states kept in int8."""


def fit(
    model: ModelConfig,
    tp: int,
    *,
    memory_bytes: int,
    block_size: int,
    dtype: torch.dtype,
    max_rows: int,
    checkpoint_share: float,
    state_dtype: torch.dtype = torch.float32,
    int8: bool = False,
) -> Room:
    """How many blocks and state slots `memory_bytes` of one rank hold.

    Models with delta layers get slots for `checkpoint_share` of the memory (if any, at least one) to keep states in,
    and one for each of `max_rows` rows, or as many as half of the rest holds; what is left is blocks, no more than
    `max_rows` sequences of the model's full length need. There are no more kept states than blocks.

    Args:
        int8: states are kept in int8.

    Raises:
        ValueError: the memory holds no block (or no slot).
    """
    unit = unit_shape(model, tp, block_size=block_size, dtype=dtype, state_dtype=state_dtype)
    arrays = 2 * model.num_kv_layers + (5 if int8 else 2) * len(model.delta_layers)
    usable = memory_bytes - ALIGNMENT_BYTES * arrays
    kept_bytes = unit.bytes_per_int8 if int8 else unit.bytes_per_slot
    num_blocks = max_rows * -(-model.max_position_embeddings // block_size)
    kept = running = 0
    if unit.bytes_per_slot:
        kept = int(usable * checkpoint_share) // kept_bytes
        kept = min(max(kept, checkpoint_share > 0), num_blocks)
        running = min(max_rows, (usable - kept * kept_bytes) // 2 // unit.bytes_per_slot)
    if unit.bytes_per_block:
        rest = usable - kept * kept_bytes - running * unit.bytes_per_slot
        num_blocks = min(num_blocks, rest // unit.bytes_per_block)
    if num_blocks < 1 or (unit.bytes_per_slot and running < 1):
        needed = 2 * max(unit.bytes_per_slot, unit.bytes_per_block) + kept * kept_bytes + memory_bytes - usable
        raise ValueError(_too_small(memory_bytes, needed, unit, keeps_states=kept > 0))
    kept = min(kept, num_blocks)
    if int8:
        return Room(num_blocks=num_blocks, num_slots=running, num_int8=kept)
    return Room(num_blocks=num_blocks, num_slots=kept + running, num_int8=0)


def _too_small(memory_bytes: int, needed: int, unit: CacheShape, *, keeps_states: bool) -> str:
    advice = ", or turn prefix_cache off, which takes state slots too" if keeps_states else ""
    return (
        f"kv_memory_bytes={memory_bytes} holds no KV: a block of {unit.block_size} tokens takes {unit.bytes_per_block} "
        f"bytes a rank and a state slot {unit.bytes_per_slot}; give at least {needed}{advice}"
    )


class KvCache:
    """The memory of a `CacheShape`, zeroed. Written by the rank's step and by pulls into blocks no step touches.

    Raises:
        ValueError: the host or the device has less memory than asked for.
    """

    def __init__(self, shape: CacheShape, device: torch.device | str) -> None:
        self.shape = shape
        self.fd = -1
        """Memory file of the flat buffer; -1 when other processes cannot map it."""
        self.progress = StepProgress()
        """Of the step that writes here."""
        self._map: mmap.mmap | None = None
        self._touch: FirstTouch | None = None
        self.buffer = self._allocate(max(shape.total_bytes, ALIGNMENT_BYTES), torch.device(device))
        """The flat buffer, uint8."""
        self.k_pools = [self._view(pool) for pool in shape.k_pools]
        self.v_pools = [self._view(pool) for pool in shape.v_pools]
        self.conv_states = [self._view(pool) for pool in shape.conv_states]
        self.delta_states = [self._view(pool) for pool in shape.delta_states]
        self.states = [self._layer_states(i) for i in range(len(shape.delta_states))]
        """By delta layer."""

    def _allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        if device.type != "cpu":
            try:
                return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError as error:
                raise ValueError(_too_large(num_bytes, str(device))) from error
        available = available_memory()
        if available is not None and num_bytes > available:
            raise ValueError(_too_large(num_bytes, f"the host ({available} bytes are free)"))
        if not hasattr(os, "memfd_create"):
            return torch.zeros(num_bytes, dtype=torch.uint8)
        self.fd = os.memfd_create("moefleet-kv")
        os.ftruncate(self.fd, num_bytes)
        self._map = mmap.mmap(self.fd, num_bytes)
        buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._touch = FirstTouch(buffer)
        return buffer

    def _view(self, pool: Pool) -> Tensor:
        flat = self.buffer[pool.offset_bytes : pool.offset_bytes + pool.num_bytes]
        return flat.view(pool.dtype).view(pool.shape)

    def _layer_states(self, index: int) -> LayerStates:
        shape, int8 = self.shape, None
        if shape.num_int8:
            int8 = Int8States(
                conv_JQW=self._view(shape.int8_convs[index]),
                delta_JVDD=self._view(shape.int8_deltas[index]),
                scales_JVD=self._view(shape.int8_scales[index]),
            )
        return LayerStates(conv_MQW=self.conv_states[index], delta_MVDD=self.delta_states[index], int8=int8)

    def keep_states(self, slots: list[int], kept: list[int]) -> None:
        """Copy state slot slots[i] of all delta layers to the place kept[i] of kept states."""
        if slots:
            slots_K, kept_K = self._indices(slots), self._indices(kept)
            for layer in self.states:
                layer.keep(slots_K, kept_K)

    def restore_states(self, kept: list[int], slots: list[int]) -> None:
        """Copy the kept state kept[i] of all delta layers to slot slots[i]."""
        if slots:
            kept_K, slots_K = self._indices(kept), self._indices(slots)
            for layer in self.states:
                layer.restore(kept_K, slots_K)

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.buffer.device)

    def close(self) -> None:
        """Let go of the memory; views handed out keep it mapped until they are gone."""
        for pools in (self.k_pools, self.v_pools, self.conv_states, self.delta_states, self.states):
            pools.clear()
        self.buffer = torch.empty(0, dtype=torch.uint8)
        if self._touch is not None:
            self._touch.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._map = None


def _too_large(num_bytes: int, where: str) -> str:
    return f"the KV cache needs {num_bytes} bytes, more than {where}; lower kv_memory_bytes or max_rows"
