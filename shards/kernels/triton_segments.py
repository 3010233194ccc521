"""What Triton kernels share: how they are started, products of tiles, tiles over rows that lie in segments."""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
import triton
from torch import Tensor
from triton import language as tl

Precision = Literal["tf32", "ieee", "widen"]


class Kernel(Protocol):
    """What `triton.jit` makes."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The kernel, to be started as that many programs."""
        ...


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: Tensor | int | float | str, warps: int = 4) -> None:
    """Start a kernel, whose parameters a type checker takes for those of one program."""
    # Products and sums are not contracted, so that kernels that share a formula share its roundings.
    kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=False)


def precision(operands: Tensor) -> Precision:
    """How `dot` multiplies: float32 is not rounded to TF32; Triton's interpreter cannot multiply bfloat16."""
    if operands.dtype == torch.float32:
        return "ieee"
    return "widen" if operands.dtype == torch.bfloat16 and operands.device.type == "cpu" else "tf32"


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """total + a @ b in float32."""
    if PRECISION == "widen":
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def find_segment(
    starts_ptr: tl.tensor, count: tl.tensor, tile: tl.tensor, block: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which rows tile number `tile` has: (segment, first row, end of the segment's rows), no rows where first >= end.

    Segment s has rows starts[s] .. starts[s + 1] - 1 and the tiles from starts[s] // block + s on: at least as many as
    it needs, so that rows // block + count tiles in all serve any split of the rows into segments, and the host need
    not know the split.
    """
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0, tl.int32) + count
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(starts_ptr + middle)
        if begin // block + middle <= tile:
            low = middle
        else:
            high = middle
    begin = tl.load(starts_ptr + low)
    end = tl.load(starts_ptr + low + 1)
    return low, begin + (tile - (begin // block + low)) * block, end


def num_tiles(rows: int, segments: int, block: int) -> int:
    """Tiles of `block` rows to start over `rows` rows in `segments` segments."""
    return rows // block + segments
