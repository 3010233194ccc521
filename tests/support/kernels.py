"""What tests of kernels share: every set that runs here, random operands, tolerances, pieces of a sequence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shards.kernels.interface import Kernels
from shards.kernels.library import load_library
from shards.kernels.native import PATHS, NativeKernels
from shards.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
DTYPES = [torch.float32, torch.bfloat16]


def runnable_paths() -> list[NativeKernels]:
    loaded = load_library()
    assert loaded is not None, "build the native kernels first: python hatch_build.py"
    return [NativeKernels(loaded, path) for i, path in enumerate(PATHS) if loaded.kernels_has_path(i)]


NATIVE = runnable_paths()
every_path = pytest.mark.parametrize("kernels", NATIVE, ids=[kernels.path for kernels in NATIVE])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = (2e-5 if expected.dtype == torch.float32 else 2e-2) * scale
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cuts(total: int, sizes: list[int]) -> list[slice]:
    """Pieces of the given sizes in turn, until total is used up."""
    pieces: list[slice] = []
    at = 0
    while at < total:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(slice(at, min(at + size, total)))
        at += size
    return pieces


def linear(
    kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, wide: bool = False
) -> Tensor:
    """Of a weight as a checkpoint has it."""
    laid_out = kernels.lay_out(weight.clone(memory_format=torch.contiguous_format), groups=groups)
    return kernels.linear(x, laid_out, bias, groups=groups, wide=wide)


def experts(
    kernels: Kernels,
    x: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    weights: Tensor | None = None,
    groups: int = 1,
    wide: bool = False,
) -> Tensor:
    """Of weights as a checkpoint has them; their weighted sum where weights of the pairs are given."""
    clones = (w.clone(memory_format=torch.contiguous_format) for w in (gate_up, down))
    laid_out = kernels.lay_out_experts(*clones, groups=groups)
    if weights is not None:
        return kernels.weighted_experts(x, ids, weights, *laid_out, groups=groups)
    return kernels.experts(x, ids, *laid_out, groups=groups, wide=wide)


def one_sequence(piece: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Slot 1, start and freshness of a step with this piece of one sequence."""
    starts = torch.tensor([0, piece.stop - piece.start])
    return torch.tensor([1]), starts, torch.tensor([piece.start == 0])
