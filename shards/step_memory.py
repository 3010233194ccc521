"""What a rank takes beside weights and cache: rows, rotary tables and the largest tensors of a step. Arithmetic only.

T tokens of a step, C hidden size, K experts a token, I columns of an expert, V vocabulary.
"""

from shards.config import ModelConfig
from shards.mesh import Layout

_FLOAT32 = 4
_INT64 = 8
_PACKED_BYTES = 32 << 20
"""Of rows that a native matrix product packs at once, as float32 at most."""


def working_bytes(
    model: ModelConfig,
    layout: Layout,
    *,
    itemsize: int,
    max_rows: int,
    max_model_len: int,
    max_step_tokens: int,
    block_size: int,
    draft_tokens: int = 0,
) -> int:
    """Bytes of one rank at its fullest step: an upper estimate that no allocator's slack is part of.

    Args:
        itemsize: bytes of one activation.
        max_rows: sequences of a lane.
        max_model_len: positions that a row holds.
        max_step_tokens: T of one lane.
        block_size: tokens a KV block.
        draft_tokens: tokens drafted a row and step, at most; each makes one more draw to verify.
    """
    tables = -(-max_model_len // block_size) * _FLOAT32
    rows = max_rows * ((max_model_len + 1) * _INT64 + tables)
    rotary = 2 * max_model_len * model.rope.rotary_dim * _FLOAT32
    tokens = max_step_tokens
    # The residual stream, its normed copy, a layer's result and their sum.
    hidden = 4 * tokens * model.hidden_size * itemsize
    packed = min(tokens * _widest_input(model) * _FLOAT32, _PACKED_BYTES)
    layer = max(_mixer_bytes(model, layout, tokens, itemsize), _mlp_bytes(model, layout, tokens, itemsize))
    draws = max_rows * (1 + draft_tokens)
    # Logits, their penalised copy, and sums of a few rows in float64.
    logits = 3 * draws * model.vocab_size * _FLOAT32
    replayed = _replayed_bytes(model, layout, draws, itemsize) if draft_tokens else 0
    taped = max_rows * (tables + _taped_bytes(model))
    return rows + rotary + hidden + packed + layer + logits + replayed + taped


def _widest_input(model: ModelConfig) -> int:
    """Columns of the widest rows that a matrix is multiplied with; the drafting head takes two hidden states."""
    heads = model.num_attention_heads * model.head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    return max(2 * model.hidden_size, heads, values, model.intermediate_size, model.shared_expert_intermediate_size)


def _taped_bytes(model: ModelConfig) -> int:
    """What decode steps on a CPU keep from one to the next, a row: logits in pieces of powers of two, and calls.

    Two tapes for each number of rows, of at most 16 calls a layer with 32 numbers each.
    """
    return 4 * model.vocab_size * _FLOAT32 + 2 * model.num_hidden_layers * 16 * 32 * _INT64


def _replayed_bytes(model: ModelConfig, layout: Layout, draws: int, itemsize: int) -> int:
    """Projections that every delta layer keeps of the verified tokens, until it is known which of them stay."""
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    columns = 2 * keys + 2 * values + 2 * model.linear_num_value_heads
    return len(model.delta_layers) * draws * columns * itemsize // layout.tp


def _mixer_bytes(model: ModelConfig, layout: Layout, tokens: int, itemsize: int) -> int:
    """Projections of a layer, and copies of their parts."""
    heads = model.num_attention_heads * (3 if model.attention_gated else 2) + 2 * model.num_key_value_heads
    attention = heads * model.head_dim * itemsize
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    values = model.linear_num_value_heads * model.linear_value_head_dim
    # The delta rule's gates are float32.
    delta = (2 * keys + 3 * values) * itemsize + 2 * model.linear_num_value_heads * _FLOAT32
    return 2 * tokens * max(attention, delta) // layout.tp


def _mlp_bytes(model: ModelConfig, layout: Layout, tokens: int, itemsize: int) -> int:
    """Inner columns, and results of each expert of a token in float32, of the tokens of all lanes."""
    dense = 3 * model.intermediate_size * itemsize // layout.tp
    if not model.num_experts:
        return tokens * dense
    experts = model.num_experts_per_tok + (1 if model.shared_expert_intermediate_size else 0)
    ranks = layout.world if layout.ep == 1 else 1
    columns = 3 * model.moe_intermediate_size * itemsize // ranks
    routed = experts * (columns + 2 * model.hidden_size * _FLOAT32)
    return tokens * max(dense, layout.dp * routed)
