"""Weights as small integers with a scale for each group of a row's columns, rounded from plain ones and laid out.

E experts, N rows, K columns, G groups a row. A weight is value * scale, not rounded.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from shards.config import Bits
from shards.weight_memory import empty_weights

GROUP: Final = 32
"""Columns that share a scale where plain weights are rounded. Divides what any rank holds of a released model."""
STRIP: Final = 16
"""Rows that lie together: a vector of 32-bit sums."""
UNIT: Final = 8
"""Columns that groups are made of at least."""
_NIBBLES: Final = 0x000F000F000F000F


@dataclass(frozen=True, slots=True, kw_only=True)
class IntRows:
    """Rows of one matrix, before they are laid out."""

    values_NK: Tensor
    """int8."""
    scales_NG: Tensor
    """float32, bfloat16 or float16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntWeights:
    """E matrices [N, K] in strips of 16 rows; behind N, rows of zeros up to a multiple of 16.

    Experts' gate and up are two such matrices of each expert, one behind the other.
    """

    values: Tensor
    """8 bits: int8 [E, S, K / 2, 16, 2], two columns of each row side by side.
    4 bits: int16 [E, S, K / 8, 16, 2]; nibble n (from the low end) of number j is column 2 n + j of eight, plus 8."""
    scales: Tensor
    """[E, S, G, 16] in float32, bfloat16 or float16."""

    @staticmethod
    def empty(experts: int, strips: int, columns: int, group: int, bits: Bits, dtype: torch.dtype) -> "IntWeights":
        """Room for `experts` matrices; dtype is that of the scales."""
        assert columns % group == 0, f"{columns} columns are no multiple of a group of {group}"
        assert group % UNIT == 0, f"a group of {group} columns is no multiple of {UNIT}"
        cpu = torch.device("cpu")
        shape, stored = ((columns // 2, STRIP, 2), torch.int8) if bits == 8 else ((columns // 8, STRIP, 2), torch.int16)
        return IntWeights(
            values=empty_weights((experts, strips, *shape), stored, cpu),
            scales=empty_weights((experts, strips, columns // group, STRIP), dtype, cpu),
        )

    def __len__(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def bits(self) -> Bits:
        """Of a value."""
        return 8 if self.values.dtype == torch.int8 else 4

    @property
    def columns(self) -> int:
        """K."""
        return self.values.shape[2] * (2 if self.bits == 8 else 8)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scales.shape[2]

    def put(self, expert: int, rows: IntRows, first: int = 0) -> None:
        """Lay out the rows of an expert's matrix from strip `first` on.

        Their groups are as large as those here, or a multiple of it: such a group's scale is then held several times.
        """
        strips = slice(first, first + strips_of(len(rows.values_NK)))
        into, scales = self.values[expert, strips], self.scales[expert, strips]
        padded = _padded(rows.values_NK, len(into)).unflatten(0, (-1, STRIP))
        if self.bits == 8:
            into.view(torch.int16).squeeze(3).copy_(padded.view(torch.int16).transpose(1, 2))
        else:
            # Eight numbers of a row are an int64; the nibbles of every other one move together.
            words = (padded + 8).view(torch.int64)
            even, odd = (_gather_nibbles(words >> shift & _NIBBLES) for shift in (0, 8))
            into.view(torch.int32).squeeze(3).copy_((even | odd << 16).transpose(1, 2))
        times = scales.shape[1] // rows.scales_NG.shape[1]
        scales_NG = rows.scales_NG.repeat_interleave(times, dim=1)
        scales.copy_(_padded(scales_NG, len(into)).unflatten(0, (-1, STRIP)).transpose(1, 2))

    def widened(self, expert: int, rows: int, first: int = 0) -> Tensor:
        """The rows that `put` took, as float32 [rows, K]."""
        strips = slice(first, first + strips_of(rows))
        values = self.values[expert, strips]
        if self.bits == 8:
            values_NK = values.transpose(1, 2).flatten(2)
        else:
            stored = values.view(torch.uint8).unflatten(3, (2, 2))
            nibbles = torch.stack((stored & 15, stored >> 4), dim=5)  # [S, K / 8, 16, 2, bytes, halves]
            values_NK = nibbles.permute(0, 2, 1, 4, 5, 3).flatten(2).to(torch.int8) - 8
        scales_NG1 = self.scales[expert, strips].transpose(1, 2).float().unsqueeze(3)
        return (values_NK.float().unflatten(2, (-1, self.group)) * scales_NG1).flatten(2).flatten(0, 1)[:rows]


ExpertWeights = Tensor | IntWeights
"""gate_up [E, 2I, C] or down [E, C, I] of the experts held here, or what stands for it."""


def strips_of(rows: int) -> int:
    """Strips that hold so many rows."""
    return -(-rows // STRIP)


def round_rows(weight_NK: Tensor, bits: Bits) -> IntRows:
    """Plain weights rounded to integers, GROUP columns a scale: what a group becomes depends on that group alone.

    The number of largest magnitude becomes the lowest integer, -2^(bits - 1), be it by a negative scale: so all of the
    range is used. A group with NaN or infinity stays not finite by its scale.
    """
    lowest = -(1 << (bits - 1))
    groups = weight_NK.float().unflatten(1, (-1, GROUP))
    top, bottom = groups.amax(2), groups.amin(2)
    # A comparison with NaN is false: the NaN must be in the term that is then taken.
    scales_NG = (torch.where(-bottom > top, bottom, top) / lowest).to(torch.bfloat16)
    divisors = torch.where(scales_NG == 0, 1, scales_NG.float()).unsqueeze(2)
    values = (groups / divisors).round_().clamp_(lowest, -lowest - 1)
    return IntRows(values_NK=values.flatten(1).to(torch.int8), scales_NG=scales_NG)


def int_bytes(count: int, bits: Bits) -> int:
    """Bytes that `count` weights take with a 16-bit scale for each GROUP; no more where groups are larger."""
    return count * bits // 8 + 2 * (-(-count // GROUP))


def _gather_nibbles(words: Tensor) -> Tensor:
    """Bits 0 to 3 of each quarter of an int64, side by side."""
    return (words | words >> 12 | words >> 24 | words >> 36) & 0xFFFF


def _padded(x: Tensor, strips: int) -> Tensor:
    """Rows of zeros behind x, up to whole strips."""
    missing = strips * STRIP - x.shape[0]
    return torch.cat((x, x.new_zeros(missing, x.shape[1]))) if missing else x
