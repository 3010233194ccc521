"""Small random checkpoints of transformers' own models, and what those models say: the reference for exactness."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHAPE: dict[str, object] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
_EXPERTS: dict[str, object] = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_SHARED_EXPERT: dict[str, object] = {"shared_expert_intermediate_size": 16}
_DELTA: dict[str, object] = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_FAMILIES: Mapping[str, Mapping[str, object]] = {
    "qwen2_moe": {**_EXPERTS, **_SHARED_EXPERT, "norm_topk_prob": False},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_SHARED_EXPERT, **_DELTA},
    "qwen3_5_moe_text": {**_EXPERTS, **_SHARED_EXPERT, **_DELTA},
}


def make_reference(
    folder: Path, architecture: str, changes: Mapping[str, object] | None = None, *, seed: int = 0
) -> PreTrainedModel:
    """Save a random checkpoint in `folder` and return transformers' model of it, float32.

    Matrices are scaled by their width, so that logits spread and greedy output does not collapse; an embedding that
    is the output head too lies between.
    """
    fields = _SHAPE | dict(_FAMILIES[architecture]) | dict(changes or {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                # Slow decay: a state of one token alone gives outputs near zero, and their norm large errors.
                parameter.copy_(noise - 2)
            elif parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            elif "embed" in name:
                parameter.copy_(noise * (0.4 if fields["tie_word_embeddings"] else 1.0))
            else:
                parameter.copy_(noise * max(1, parameter.shape[-1]) ** -0.5)
    model.eval().save_pretrained(folder)
    return model


def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """Full forward pass -> float32 [len(token_ids), V]."""
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()
