"""Rotary tables: inverse frequencies of plain and YaRN rotary embeddings, and cos and sin by position.

R is RopeConfig.rotary_dim, P positions. Angles are the float32 products transformers forms; cos and sin of them are
taken in float64 and rounded once, so that a table's bits depend neither on its length nor on a vector library.
"""

import math

import torch
from torch import Tensor

from shards.rope_config import RopeConfig

_PIECE_POSITIONS = 4096


def inverse_frequencies(rope: RopeConfig) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, and the factor on cos and sin.

    Returns:
        inv_freq float32 [R/2], and the attention scaling (1.0 unless YaRN).
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    periods = rope.theta**exponents
    if rope.type == "default":
        return 1.0 / periods, 1.0
    low, high = _correction_range(rope)
    pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    inv_freq = 1.0 / (rope.factor * periods) * (1 - kept) + 1.0 / periods * kept
    return inv_freq, _attention_scaling(rope)


def rotary_tables(rope: RopeConfig, max_positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0 .. max_positions-1, scaled, both halves repeated: float32 [P, R] each.

    They are computed on the CPU and moved to `device`, so that every device has the same ones.
    """
    inv_freq, scaling = inverse_frequencies(rope)
    cos = torch.empty(max_positions, rope.rotary_dim)
    sin = torch.empty(max_positions, rope.rotary_dim)
    half = rope.rotary_dim // 2
    for start in range(0, max_positions, _PIECE_POSITIONS):
        stop = min(start + _PIECE_POSITIONS, max_positions)
        angles = (torch.arange(start, stop).float()[:, None] * inv_freq).double()
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            scaled = values.float() * scaling
            table[start:stop, :half] = scaled
            table[start:stop, half:] = scaled
    return cos.to(device), sin.to(device)


def _correction_range(rope: RopeConfig) -> tuple[float, float]:
    """Pairs between which YaRN goes over from the original frequency to the stretched one."""

    def pair_that_turns(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, high + 0.001 if low == high else high


def _attention_scaling(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return _magnitude(rope.factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
