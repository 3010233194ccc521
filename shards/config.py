"""ModelConfig: the shape of one model, whatever its family, as its layers need to know it."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from shards.rope_config import RopeConfig

LayerType = Literal["full_attention", "linear_attention"]
PackedForm = Literal["gptq", "pack-quantized"]
Bits = Literal[4, 8]
"""Of an integer weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """How a checkpoint of integer weights holds them; see `shards.packed`."""

    form: PackedForm
    bits: Bits
    group_size: int
    """Columns that share a scale; 0: whole rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model's shape. Names are those of Hugging Face configs where they exist."""

    architecture: str
    """The family, by its name in `shards.families.FAMILIES`."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int = 0
    """Width of the dense layers' MLP; 0 where no layer is dense."""
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    """0: no shared expert."""
    num_experts: int = 0
    """0: every layer has a dense MLP."""
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    layer_types: tuple[LayerType, ...]
    """One entry a layer."""
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_proj_bias: bool = False
    qk_norm: bool = True
    """RMSNorm of each query and key head."""
    attention_gated: bool = False
    """q_proj carries a sigmoid gate beside each query head."""
    zero_centred_norm: bool = False
    """Norms multiply by 1 + weight (all but the delta output norm)."""
    rms_norm_eps: float = 1e-6
    rope: RopeConfig
    max_position_embeddings: int
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0
    linear_split_projections: bool = False
    """Delta layers store in_proj_qkv, _z, _b and _a; else in_proj_qkvz and _ba, laid out by key head."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    may_have_mtp: bool = False
    """Checkpoints of the family may hold a multi-token prediction head, under `mtp.`, even where no field says so."""
    num_nextn_predict_layers: int = 0
    """Multi-token prediction layers: in a checkpoint's config those it says to hold, in a served model's those used."""
    weight_block_size: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale in a block-FP8 checkpoint; None: it holds no such weights."""
    packed_weights: PackedWeights | None = None
    """Of a checkpoint with integer weights; None: it holds none."""
    unused_tensors: tuple[str, ...] = ()
    """Prefixes of tensors that the checkpoint may hold and text needs none of."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers with paged KV."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "full_attention")

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a recurrent state."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "linear_attention")

    @property
    def num_kv_layers(self) -> int:
        """Layers with paged KV: those of `attention_layers`, then the multi-token prediction layer where it is used."""
        return len(self.attention_layers) + self.num_nextn_predict_layers

    def with_drafts(self, draft_tokens: int) -> "ModelConfig":
        """The config of a served model that drafts up to `draft_tokens` tokens a step; 0: none.

        Raises:
            ValueError: the architecture has no multi-token prediction head, or the checkpoint one of several layers.
        """
        if draft_tokens and not self.may_have_mtp:
            raise ValueError(
                f"draft_tokens={draft_tokens} needs a multi-token prediction head, which {self.architecture} has not; "
                "use draft_tokens=0"
            )
        if draft_tokens and self.num_nextn_predict_layers > 1:
            raise ValueError(
                f"draft_tokens={draft_tokens}: num_nextn_predict_layers={self.num_nextn_predict_layers} is not "
                "supported, only a head of one layer is; use draft_tokens=0"
            )
        return dataclasses.replace(self, num_nextn_predict_layers=int(draft_tokens > 0))

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` has experts rather than a dense MLP."""
        listed = index in self.mlp_only_layers
        return self.num_experts > 0 and not listed and (index + 1) % self.decoder_sparse_step == 0

    def fingerprint(self) -> str:
        """Hex digest (64 digits) of every field: equal on two sides exactly when the configs are equal."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()
