"""Which slice of each tensor a rank holds, and which layouts a model's shapes allow: arithmetic only, no torch.

Attention and delta layers are cut by heads over tp, dense MLPs by columns over tp, experts by columns over all ranks
(ep 1) or whole over all ranks (ep = tp x dp), the vocabulary over tp.
"""

from dataclasses import dataclass

from shards.config import ModelConfig
from shards.mesh import Layout, Place


def even_range(total: int, parts: int, part: int) -> range:
    """Part `part` of range(total) cut into `parts` equal pieces; `parts` divides `total`."""
    assert total % parts == 0
    size = total // parts
    return range(part * size, (part + 1) * size)


def kv_head_range(num_kv_heads: int, tp: int, tp_rank: int) -> range:
    """Global KV heads a rank holds: an even piece, or one head shared with its neighbours when tp is larger."""
    if tp <= num_kv_heads:
        return even_range(num_kv_heads, tp, tp_rank)
    head = tp_rank * num_kv_heads // tp
    return range(head, head + 1)


def vocab_range(vocab_size: int, tp: int, tp_rank: int) -> range:
    """Token ids whose embedding and logit a rank holds: ceil(V / tp) each, the last rank what is left."""
    size = -(-vocab_size // tp)
    return range(min(tp_rank * size, vocab_size), min((tp_rank + 1) * size, vocab_size))


def token_range(num_tokens: int, tp: int, tp_rank: int) -> range:
    """The lane's tokens that a rank sends to their experts: ceil(T / tp) each, the last ranks what is left."""
    size = -(-num_tokens // tp)
    return range(min(tp_rank * size, num_tokens), min((tp_rank + 1) * size, num_tokens))


def largest_groups(units: int, groups: int) -> int:
    """The largest power of two that is at most `groups` and divides `units`."""
    power = 1
    while power * 2 <= groups and units % (power * 2) == 0:
        power *= 2
    return power


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowCut:
    """A row-parallel matrix: `units` indivisible pieces of its inner axis, `ranks` that share them."""

    what: str
    units: int
    ranks: int


def expert_parts(model: ModelConfig, layout: Layout, *, deterministic: bool, groups: int = 4) -> tuple[int, int]:
    """Ranks that share each expert's columns, and parts of one rank's sum over them."""
    ranks = layout.world if layout.ep == 1 else 1
    return ranks, max(1, largest_groups(model.moe_intermediate_size, groups) // ranks) if deterministic else 1


def _row_cuts(model: ModelConfig, layout: Layout) -> list[_RowCut]:
    """Every kind of row-parallel matrix the model has."""
    expert_ranks = layout.world if layout.ep == 1 else 1
    moe = [model.is_moe_layer(i) for i in range(model.num_hidden_layers)]
    cuts = []
    if model.attention_layers:
        cuts.append(_RowCut(what="num_attention_heads", units=model.num_attention_heads, ranks=layout.tp))
    if model.delta_layers:
        cuts.append(_RowCut(what="linear_num_key_heads", units=model.linear_num_key_heads, ranks=layout.tp))
    if not all(moe):
        cuts.append(_RowCut(what="intermediate_size", units=model.intermediate_size, ranks=layout.tp))
    if any(moe):
        cuts.append(_RowCut(what="moe_intermediate_size", units=model.moe_intermediate_size, ranks=expert_ranks))
    if any(moe) and model.shared_expert_intermediate_size:
        shared = model.shared_expert_intermediate_size
        cuts.append(_RowCut(what="shared_expert_intermediate_size", units=shared, ranks=expert_ranks))
    return cuts


def _describe(layout: Layout) -> str:
    return f"tp={layout.tp} dp={layout.dp} ep={layout.ep}"


def _check_experts(model: ModelConfig, layout: Layout) -> None:
    if layout.ep > 1 and not model.num_experts:
        raise ValueError(f"{_describe(layout)}: the model has no experts to spread; use ep=1")
    if layout.ep > 1 and model.num_experts % layout.ep:
        raise ValueError(
            f"{_describe(layout)}: num_experts={model.num_experts} must be a multiple of ep={layout.ep}; "
            f"use ep=1 (a slice of every expert on each rank) or a tp x dp that divides {model.num_experts}"
        )


def check_layout(model: ModelConfig, layout: Layout, *, deterministic: bool, groups: int = 4) -> None:
    """Refuse a layout that the model's shapes do not allow; needs no weights.

    Args:
        deterministic: results must have the same bits in every layout, so that every row-parallel sum is cut into
            `groups` parts that whole ranks hold.
        groups: parts of a row-parallel sum in deterministic mode (a power of two).

    Raises:
        ValueError: names the numbers and what would do.
    """
    if groups < 1 or groups & (groups - 1):
        raise ValueError(f"reduction_groups={groups} must be a power of two, such as 4")
    kv_heads, tp = model.num_key_value_heads, layout.tp
    if model.attention_layers and kv_heads % tp and tp % kv_heads:
        raise ValueError(
            f"{_describe(layout)}: num_key_value_heads={kv_heads} must be a multiple of tp={tp} or divide it; "
            f"choose a tp that divides {kv_heads} or is a multiple of it"
        )
    for cut in _row_cuts(model, layout):
        if cut.units % cut.ranks:
            raise ValueError(
                f"{_describe(layout)}: {cut.what}={cut.units} is shared by {cut.ranks} ranks; "
                f"choose a number of ranks that divides {cut.units}"
            )
        if deterministic and largest_groups(cut.units, groups) % cut.ranks:
            most = largest_groups(cut.units, groups)
            raise ValueError(
                f"{_describe(layout)}: in deterministic mode {cut.what}={cut.units} with reduction_groups={groups} "
                f"can be shared by a power of two of at most {most} ranks, not {cut.ranks}; "
                "choose fewer ranks, more reduction_groups, or deterministic=off"
            )
    _check_experts(model, layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """The slices one rank holds. Ranges are global indices of what their name says."""

    heads: range
    kv_heads: range
    key_heads: range
    """Key heads of the delta layers, each with its value heads."""
    dense_columns: range
    vocab: range
    vocab_shard_size: int
    """The most token ids a rank of the lane holds; the last rank may hold fewer."""
    experts: range
    expert_columns: range
    shared_columns: range
    head_groups: int
    """Parts of this rank's share of o_proj's sum; the other `_groups` likewise."""
    key_head_groups: int
    dense_groups: int
    expert_groups: int
    shared_groups: int


def make_cuts(model: ModelConfig, place: Place, *, deterministic: bool, groups: int = 4) -> Cuts:
    """What `place` holds of `model`; the layout has passed `check_layout`."""
    layout, tp, t = place.layout, place.layout.tp, place.tp_rank
    expert_ranks, expert_rank = (layout.world, place.rank) if layout.ep == 1 else (1, 0)

    def share(units: int, ranks: int) -> int:
        return max(1, largest_groups(units, groups) // ranks) if deterministic else 1

    def columns(present: bool, total: int, ranks: int, rank: int) -> range:
        return even_range(total, ranks, rank) if present else range(0)

    moe = [model.is_moe_layer(i) for i in range(model.num_hidden_layers)]
    shared = model.shared_expert_intermediate_size
    has_attention = bool(model.attention_layers)
    key_heads = columns(bool(model.delta_layers), model.linear_num_key_heads, tp, t)
    return Cuts(
        heads=columns(has_attention, model.num_attention_heads, tp, t),
        kv_heads=kv_head_range(model.num_key_value_heads, tp, t) if has_attention else range(0),
        key_heads=key_heads,
        dense_columns=columns(not all(moe), model.intermediate_size, tp, t),
        vocab=vocab_range(model.vocab_size, tp, t),
        vocab_shard_size=len(vocab_range(model.vocab_size, tp, 0)),
        experts=columns(any(moe), model.num_experts, layout.ep, place.rank % layout.ep),
        expert_columns=columns(any(moe), model.moe_intermediate_size, expert_ranks, expert_rank),
        shared_columns=columns(any(moe), shared, expert_ranks, expert_rank),
        head_groups=share(model.num_attention_heads, tp),
        key_head_groups=share(model.linear_num_key_heads, tp),
        dense_groups=share(model.intermediate_size, tp),
        expert_groups=expert_parts(model, layout, deterministic=deterministic, groups=groups)[1],
        shared_groups=share(shared, expert_ranks) if shared else 1,
    )
