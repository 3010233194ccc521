"""Qwen3-MoE: what a decoder layer is made of and what its tensors are called."""

from shards.attention import Attention
from shards.linear import DenseMlp
from shards.loading import Loader
from shards.moe import Moe


def load_mixer(loader: Loader, index: int) -> Attention:
    """Layer `index`'s attention."""
    return Attention.load(loader, f"model.layers.{index}.self_attn")


def load_mlp(loader: Loader, index: int) -> DenseMlp | Moe:
    """Layer `index`'s experts, or its dense MLP where the config says so."""
    config, cuts, prefix = loader.config, loader.cuts, f"model.layers.{index}.mlp"
    if config.is_moe_layer(index):
        return Moe.load(loader, prefix)
    return loader.mlp(prefix, config.intermediate_size, cuts.dense_columns, cuts.dense_groups)
