"""RopeConfig: the rotary embedding's parameters, read from either spelling that Hugging Face configs use."""

from dataclasses import dataclass
from typing import Literal

from shards.config_fields import Fields

RopeType = Literal["default", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the YaRN fields are unused when type is "default"."""

    theta: float
    rotary_dim: int
    """Leading dimensions of each head that are rotated; even."""
    type: RopeType = "default"
    factor: float = 1.0
    """YaRN: how many times longer than the original context."""
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """YaRN: scale of cos and sin; None derives it from factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """YaRN: round the correction range to whole dimensions."""

    @property
    def stretched_positions(self) -> int:
        """YaRN: positions of the longer context; 0 where nothing is stretched."""
        return int(self.factor * self.original_max_position_embeddings)

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and at least 2, got {self.rotary_dim}")


def read_rope(
    fields: Fields,
    *,
    head_dim: int,
    max_position_embeddings: int,
    default_partial: float,
    harmless: frozenset[str] = frozenset(),
) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or rope_theta, rope_scaling, partial_rotary_factor at the top level.

    Args:
        fields: the whole config.json.
        head_dim: size of an attention head.
        max_position_embeddings: stands in for a missing original_max_position_embeddings, as in transformers.
        default_partial: the architecture's partial_rotary_factor where the config has none.
        harmless: names in the section that change nothing here.

    Raises:
        ValueError: a rope type, field or value that is not supported, by name.
    """
    nested = _rope_section(fields)
    theta_field = nested if nested.present("rope_theta") else fields
    theta = theta_field.number("rope_theta")
    partial_field = nested if nested.present("partial_rotary_factor") else fields
    partial = partial_field.number("partial_rotary_factor", default_partial)
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise partial_field.error(
            "partial_rotary_factor", f"of head_dim {head_dim} it must give an even number from 2 to {head_dim}"
        )
    for unused in ("rope_theta", "partial_rotary_factor"):
        fields.raw(unused)
    rope_type = nested.text("rope_type", nested.text("type", "default"))
    if rope_type == "default":
        rope = RopeConfig(theta=theta, rotary_dim=rotary_dim)
    elif rope_type == "yarn":
        rope = _read_yarn(nested, theta, rotary_dim, max_position_embeddings)
    else:
        name = "rope_type" if nested.present("rope_type") else "type"
        raise nested.error(name, "supported rope types are default and yarn")
    nested.refuse_unread(harmless)
    return rope


def _rope_section(fields: Fields) -> Fields:
    scaling = fields.section("rope_scaling")
    parameters = fields.section("rope_parameters")
    if scaling is not None and parameters is not None:
        raise fields.error("rope_scaling", "rope_parameters is given too; keep one of them")
    return scaling or parameters or Fields({}, fields.source)


def _read_yarn(nested: Fields, theta: float, rotary_dim: int, max_position_embeddings: int) -> RopeConfig:
    if nested.present("factor"):
        original = nested.integer("original_max_position_embeddings", max_position_embeddings)
        factor = nested.number("factor")
    else:
        original = nested.integer("original_max_position_embeddings")
        factor = nested.number("factor", max_position_embeddings / original)
    if factor < 1:
        raise nested.error("factor", "it must be at least 1")
    if original > max_position_embeddings:
        raise nested.error(
            "original_max_position_embeddings",
            f"it must not be above max_position_embeddings, {max_position_embeddings}; give the trained length in both",
        )
    # Zero means unset for the betas and mscales in transformers, which tests them for truth.
    beta_fast = nested.number("beta_fast", 0.0, or_zero=True) or 32.0
    beta_slow = nested.number("beta_slow", 0.0, or_zero=True) or 1.0
    if beta_fast < beta_slow:
        raise nested.error("beta_fast", f"it must not be below beta_slow, {beta_slow:g}")
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        attention_factor=nested.optional_number("attention_factor"),
        mscale=nested.optional_number("mscale", or_zero=True),
        mscale_all_dim=nested.optional_number("mscale_all_dim", or_zero=True),
        truncate=nested.flag("truncate", True),
    )
