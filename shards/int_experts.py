"""Experts held as small integers: whether a model, layout and kernels can have them, and how a rank loads them.

They come from a checkpoint of integers, as they are, or from plain weights, rounded a few experts at a time: the plain
ones are never all in memory. A group's integers are the same on every rank and in every layout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch

from shards.config import Bits, ModelConfig
from shards.cuts import Cuts, expert_parts
from shards.int_weights import GROUP, UNIT, IntRows, IntWeights, round_rows, strips_of
from shards.mesh import Layout
from shards.weights import CheckpointReader

ExpertChoice = Literal["checkpoint", "int8", "int4"]
"""What experts are held as: as the checkpoint holds them (in the engine's dtype, if not integers), or integers."""
_AT_ONCE: Final = 1 << 22
"""Plain weights that are in memory before they are rounded."""


def expert_bits(model: ModelConfig, choice: ExpertChoice) -> Bits | None:
    """Bits of the experts' integers; None where they are plain.

    Raises:
        ValueError: there are no experts, or the checkpoint has integers of other bits.
    """
    packed = model.packed_weights.bits if model.packed_weights and model.num_experts else None
    if choice == "checkpoint":
        return packed
    bits: Bits = 8 if choice == "int8" else 4
    if not model.num_experts:
        raise ValueError(f"expert_weights={choice}: the model has no experts; use expert_weights=checkpoint")
    if packed not in (None, bits):
        raise ValueError(
            f"expert_weights={choice}: the checkpoint holds integers of {packed} bits, which are not rounded again; "
            "use expert_weights=checkpoint, or the bf16 release"
        )
    return bits


def check_int_experts(
    model: ModelConfig,
    layout: Layout,
    choice: ExpertChoice,
    *,
    device: str,
    kernels: str,
    deterministic: bool,
    groups: int = 4,
) -> None:
    """Refuse experts in integers where model, layout or kernels cannot have them; needs no weights.

    Args:
        kernels: the set that runs, by its name.
        groups: as in `check_layout`, which the layout has passed.

    Raises:
        ValueError: names the option, the value and what would do.
    """
    bits = expert_bits(model, choice)
    if bits is None:
        return
    if device.partition(":")[0] != "cpu" or kernels == "triton":
        raise ValueError(
            f"expert_weights={choice} (int{bits}) runs on device cpu with kernels native or torch only, got "
            f"device={device} kernels={kernels}; use those, or a bf16 or FP8 checkpoint with expert_weights=checkpoint"
        )
    ranks, parts = expert_parts(model, layout, deterministic=deterministic, groups=groups)
    held = model.moe_intermediate_size // ranks
    rounded = model.packed_weights is None
    for what, columns, part in (
        ("hidden_size", model.hidden_size, model.hidden_size),
        (f"moe_intermediate_size={model.moe_intermediate_size} over {ranks} rank(s)", held, held // parts),
    ):
        if rounded and columns % GROUP:
            raise ValueError(
                f"expert_weights={choice}: {what} gives {columns} columns, which must be a multiple of {GROUP}, that "
                "share a scale; use fewer ranks (or whole experts, ep = tp x dp), or expert_weights=checkpoint"
            )
        if _group(model, part) % UNIT:
            raise ValueError(
                f"expert_weights={choice} (int{bits}): {what} gives sums of {part} columns, which must be a multiple "
                f"of {UNIT}; use fewer ranks, or a bf16 or FP8 checkpoint with expert_weights=checkpoint"
            )


def _group(model: ModelConfig, part: int) -> int:
    """Columns that share a scale, of sums of `part` columns: groups that reach over a part's end are cut there."""
    packed = model.packed_weights
    stored = GROUP if packed is None else packed.group_size
    return math.gcd(stored, part)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expert:
    gate: IntRows
    up: IntRows
    down: IntRows


def load_int_experts(
    reader: CheckpointReader, prefix: str, model: ModelConfig, cuts: Cuts, bits: Bits
) -> tuple[IntWeights, IntWeights]:
    """gate_up and down of the experts and columns held here.

    Args:
        prefix: such as "model.layers.0.mlp.experts".

    Raises:
        ValueError: a tensor is missing, has the wrong shape, or is of a kind that cannot be read.
    """
    experts, hidden, held = len(cuts.experts), model.hidden_size, len(cuts.expert_columns)
    dtype = reader.packed_scales(_name(prefix, cuts.experts.start, "gate")) if model.packed_weights else torch.bfloat16
    assert dtype is not None
    source = (_stored if model.packed_weights else _rounded)(reader, prefix, model, cuts, bits)
    gate_up = IntWeights.empty(experts, 2 * strips_of(held), hidden, _group(model, hidden), bits, dtype)
    along = _group(model, held // cuts.expert_groups)
    down = IntWeights.empty(experts, strips_of(hidden), held, along, bits, dtype)
    threads = torch.get_num_threads()
    # Thousands of operators on small matrices: waking threads for each takes longer than the work.
    torch.set_num_threads(1)
    try:
        for place, expert in enumerate(source):
            _check_scales(prefix, expert, dtype)
            gate_up.put(place, expert.gate)
            gate_up.put(place, expert.up, strips_of(held))
            down.put(place, expert.down)
    finally:
        torch.set_num_threads(threads)
    return gate_up, down


def _check_scales(prefix: str, expert: _Expert, dtype: torch.dtype) -> None:
    found = {rows.scales_NG.dtype for rows in (expert.gate, expert.up, expert.down)} - {dtype}
    if found:
        raise ValueError(
            f"{prefix}: scales of some experts are {dtype}, of others {found.pop()}; only one dtype in a layer is "
            "supported, use another release"
        )


def holds_ints(reader: CheckpointReader, prefix: str, model: ModelConfig) -> bool:
    """Whether a layer's experts are to be integers: a checkpoint of integers may have layers that are not."""
    if model.packed_weights is None:
        return True
    return is_int_expert(reader, _name(prefix, 0, "gate"), model)


def is_int_expert(reader: CheckpointReader, name: str, model: ModelConfig) -> bool:
    """Whether a tensor is one that is held as integers where experts are."""
    return ".experts." in name and (model.packed_weights is None or reader.packed_scales(name) is not None)


def _name(prefix: str, expert: int, kind: str) -> str:
    return f"{prefix}.{expert}.{kind}_proj.weight"


def _stored(reader: CheckpointReader, prefix: str, model: ModelConfig, cuts: Cuts, _: Bits) -> Iterator[_Expert]:
    """Experts of a checkpoint of integers, which are stored one by one."""
    width, hidden = model.moe_intermediate_size, model.hidden_size
    columns = slice(cuts.expert_columns.start, cuts.expert_columns.stop)
    across, along = _group(model, hidden), _group(model, len(cuts.expert_columns) // cuts.expert_groups)
    for expert in range(model.num_experts):
        gate, up, down = (_name(prefix, expert, kind) for kind in ("gate", "up", "down"))
        for name, shape in ((gate, (width, hidden)), (up, (width, hidden)), (down, (hidden, width))):
            reader.expect(name, shape)
            if expert not in cuts.experts:
                reader.skip(name)
        if expert in cuts.experts:
            yield _Expert(
                gate=reader.read_ints(gate, columns, slice(None), across),
                up=reader.read_ints(up, columns, slice(None), across),
                down=reader.read_ints(down, slice(None), columns, along),
            )


def _rounded(reader: CheckpointReader, prefix: str, model: ModelConfig, cuts: Cuts, bits: Bits) -> Iterator[_Expert]:
    """Experts of plain weights, some read at a time."""
    width, hidden, held = model.moe_intermediate_size, model.hidden_size, cuts.expert_columns
    columns = slice(held.start, held.stop)
    step = max(_AT_ONCE // (3 * len(held) * hidden), 1)
    for first in range(0, len(cuts.experts), step):
        some = cuts.experts[first : first + step]
        sizes = (model.num_experts, width, hidden)
        gate_up, down = reader.read_experts(prefix, some, columns, expect=sizes)
        for place in range(len(some)):
            gate, up = gate_up[place].chunk(2)
            yield _Expert(gate=round_rows(gate, bits), up=round_rows(up, bits), down=round_rows(down[place], bits))
        # Before the next ones are read.
        del gate_up, down, gate, up
