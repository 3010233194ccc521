"""Lanes of KvCaches filled by slicing global tensors, and the check that rows arrived in a lane of another tp."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.plan import KvLayout
from shards.cache import KvCache, cache_shape
from shards.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes of one lane of caches."""

    tp: int
    num_blocks: int = 12
    num_slots: int = 3
    block_size: int = 4
    dtype: torch.dtype = torch.float32

    def layout(self, model: ModelConfig) -> KvLayout:
        dtype = str(self.dtype).removeprefix("torch.")
        return KvLayout(
            fingerprint=f"{model.fingerprint()}:{dtype}",
            tp=self.tp,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_slots=self.num_slots,
            dtype=dtype,
        )


def make_lane(model: ModelConfig, geometry: Geometry, device: str = "cpu") -> list[KvCache]:
    """A lane's caches by tp rank, zeroed."""
    return [
        KvCache(
            cache_shape(
                model,
                geometry.tp,
                rank,
                num_blocks=geometry.num_blocks,
                block_size=geometry.block_size,
                num_slots=geometry.num_slots,
                dtype=geometry.dtype,
            ),
            device,
        )
        for rank in range(geometry.tp)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalState:
    """The uncut tensors of every layer, as one rank of tp 1 would hold them."""

    k: list[Tensor]
    v: list[Tensor]
    conv: list[tuple[Tensor, ...]]
    """The q, k and v sections, [M, key heads, channels of one, W - 1]."""
    delta: list[Tensor]
    """[M, key heads, value heads of one, Dk, Dv]."""


def make_global(model: ModelConfig, geometry: Geometry, seed: int = 0) -> GlobalState:
    """Random contents for a whole cache."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = geometry.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kv_shape = (geometry.num_blocks, model.num_key_value_heads, geometry.block_size, model.head_dim)
    heads, width = model.linear_num_key_heads, model.linear_conv_kernel_dim - 1
    ratio = model.linear_num_value_heads // max(1, heads)
    key_dim, value_dim, slots = model.linear_key_head_dim, model.linear_value_head_dim, geometry.num_slots
    return GlobalState(
        k=[draw(*kv_shape) for _ in model.attention_layers],
        v=[draw(*kv_shape) for _ in model.attention_layers],
        conv=[
            tuple(draw(slots, heads, size, width) for size in (key_dim, key_dim, ratio * value_dim))
            for _ in model.delta_layers
        ],
        delta=[draw(slots, heads, ratio, key_dim, value_dim, dtype=torch.float32) for _ in model.delta_layers],
    )


def rank_part(state: GlobalState, cache: KvCache) -> list[list[Tensor]]:
    """What a rank holds of the global tensors: lists like k_pools, v_pools, conv_states, delta_states."""
    kv, key = cache.shape.kv_heads, cache.shape.key_heads
    kv_cut, key_cut = slice(kv.start, kv.stop), slice(key.start, key.stop)
    return [
        [pool[:, kv_cut] for pool in state.k],
        [pool[:, kv_cut] for pool in state.v],
        [torch.cat([section[:, key_cut].flatten(1, 2) for section in layer], dim=1) for layer in state.conv],
        [layer[:, key_cut].flatten(1, 2) for layer in state.delta],
    ]


def fill(lane: Sequence[KvCache], state: GlobalState) -> None:
    """Write each rank's part of the global tensors into its cache."""
    for cache in lane:
        pools = (cache.k_pools, cache.v_pools, cache.conv_states, cache.delta_states)
        for views, parts in zip(pools, rank_part(state, cache), strict=True):
            for view, part in zip(views, parts, strict=True):
                view.copy_(part)


def assert_moved(
    lane: Sequence[KvCache], state: GlobalState, blocks: Sequence[tuple[int, int]], slots: tuple[int, int] | None
) -> None:
    """Every rank of `lane` holds the global rows named by the pairs, bit for bit, and zeros elsewhere."""
    for cache in lane:
        k, v, conv, delta = rank_part(state, cache)
        slot_pairs: list[tuple[int, int]] = [] if slots is None else [slots]
        kinds = (
            (cache.k_pools, k, blocks),
            (cache.v_pools, v, blocks),
            (cache.conv_states, conv, slot_pairs),
            (cache.delta_states, delta, slot_pairs),
        )
        for views, parts, pairs in kinds:
            for view, part in zip(views, parts, strict=True):
                wanted = torch.zeros_like(view, device="cpu")
                for src, dst in pairs:
                    wanted[dst] = part[src]
                assert torch.equal(view.cpu(), wanted)
