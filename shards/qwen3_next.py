"""Qwen3-Next: what a decoder layer is made of and what its tensors are called."""

from shards import qwen3_moe
from shards.attention import Attention
from shards.delta import Delta
from shards.linear import DenseMlp
from shards.loading import Loader
from shards.moe import Moe


def load_mixer(loader: Loader, index: int) -> Attention | Delta:
    """Layer `index`'s gated attention or gated delta net, as `layer_types` says."""
    if index in loader.config.delta_layers:
        return Delta.load(loader, f"model.layers.{index}.linear_attn")
    return qwen3_moe.load_mixer(loader, index)


def load_mlp(loader: Loader, index: int) -> DenseMlp | Moe:
    """Layer `index`'s experts with the shared one, or its dense MLP: the names are Qwen3-MoE's."""
    return qwen3_moe.load_mlp(loader, index)
