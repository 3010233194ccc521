"""Block-FP8 weights, as Qwen releases them: E4M3 numbers, and one float32 scale for each block of rows and columns.

R rows, K columns; leading axes (experts) may come before both.
"""

from typing import Final

import torch
from torch import Tensor

DTYPE: Final = torch.float8_e4m3fn
READ_AS: Final = torch.bfloat16
"""What the numbers times their scales are rounded to, as the bf16 release of the same model holds them."""
SCALE_SUFFIX: Final = "_scale_inv"
"""The scales of tensor X are tensor X_scale_inv: what a stored number is multiplied by, despite the name."""


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight [.., R, K]; blocks at the ends may be partial."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def scale_slices(
    shape: tuple[int, ...], slices: tuple[slice, ...], block: tuple[int, int]
) -> tuple[tuple[slice, ...], tuple[int, int]]:
    """Which scales a slice of a weight of `shape` needs.

    Returns:
        slices of the scales' axes, and how far into their first block the weight's rows and columns begin.
    """
    whole = (*slices, *(slice(None) for _ in range(len(shape) - len(slices))))
    ends = [part.indices(size)[:2] for part, size in zip(whole[-2:], shape[-2:], strict=True)]
    scales = tuple(
        slice(start // size, max(-(-stop // size), start // size))
        for (start, stop), size in zip(ends, block, strict=True)
    )
    (row, _), (column, _) = ends
    return (*whole[:-2], *scales), (row % block[0], column % block[1])


def dequantise(values: Tensor, scales: Tensor, offset: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Numbers times scales, in float32, rounded to READ_AS.

    Args:
        values: [.., R, K] in E4M3.
        scales: those that `scale_slices` named.
        offset: how far into their first block R and K begin.
        block: rows and columns of a block.
    """
    rows = (torch.arange(values.shape[-2]) + offset[0]) // block[0]
    columns = (torch.arange(values.shape[-1]) + offset[1]) // block[1]
    spread = scales.to(torch.float32).index_select(-2, rows).index_select(-1, columns)
    return (values.to(torch.float32) * spread).to(READ_AS)
