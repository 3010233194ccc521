"""What tests of kernels share: every set that runs here, random operands, tolerances, pieces of a sequence."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shards.kernels.library import load_library
from shards.kernels.native import PATHS, NativeKernels
from shards.kernels.torch_kernels import TorchKernels

REFERENCE = TorchKernels()
DTYPES = [torch.float32, torch.bfloat16]


def runnable_paths() -> list[NativeKernels]:
    loaded = load_library()
    assert loaded is not None, "build the native kernels first: python hatch_build.py"
    best = NativeKernels(loaded)
    return [NativeKernels(loaded, path) for path in PATHS[: PATHS.index(best.path) + 1]]


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


def one_sequence(piece: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Slot 1, start and freshness of a step with this piece of one sequence."""
    starts = torch.tensor([0, piece.stop - piece.start])
    return torch.tensor([1]), starts, torch.tensor([piece.start == 0])
