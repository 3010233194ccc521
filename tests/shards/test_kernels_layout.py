"""Weights laid out for the native kernels: in place, whole, and again as they were row by row."""

import pytest
import torch

from shards.kernels.native import NativeKernels
from tests.support.kernels import NATIVE, REFERENCE, every_dtype, every_path, linear, random, threads


@every_path
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (16, 6), (37, 33), (100, 64)])
def test_rows_of_a_laid_out_weight_are_those_of_the_checkpoint(
    kernels: NativeKernels, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, ids = random(*shape, dtype=dtype), torch.arange(shape[0]).flip(0)
    laid_out = weight.clone()
    place = laid_out.data_ptr()
    laid_out = kernels.lay_out(laid_out)
    assert laid_out.data_ptr() == place
    assert torch.equal(laid_out.flatten().sort().values, weight.flatten().sort().values)
    assert torch.equal(kernels.take_rows(laid_out, ids), weight[ids])
    assert torch.equal(REFERENCE.take_rows(REFERENCE.lay_out(weight), ids), weight[ids])


@every_path
@every_dtype
def test_a_weight_is_the_same_however_many_threads_lay_it_out(kernels: NativeKernels, dtype: torch.dtype) -> None:
    weight = random(3, 300, 200, dtype=dtype)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(kernels.lay_out_experts(weight.clone(), weight.clone(), groups=4))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_path
@every_dtype
@pytest.mark.parametrize("groups", [1, 4])
def test_numbers_that_no_float_may_multiply_stay_where_they_are(
    kernels: NativeKernels, dtype: torch.dtype, groups: int
) -> None:
    # Infinities of one row and column show in their sum alone: lanes and what is packed beside them stay apart.
    weight, x = random(37, 36, dtype=dtype), random(15, 36, dtype=dtype)
    weight[20, 8], x[3, 0] = torch.inf, torch.inf
    weight[:20, 0] = weight[21:, 0] = 1.0
    weight[20, 0] = 0.0
    found = linear(kernels, x, weight, groups=groups)
    bad = torch.zeros(15, 37, dtype=torch.bool)
    bad[3] = bad[:, 20] = True
    assert torch.equal(~found.isfinite(), bad)


def test_what_cannot_be_laid_out_is_refused() -> None:
    kernels = NATIVE[-1]
    with pytest.raises(ValueError, match=r"weight is .* strides \[1, 8\] .* contiguous"):
        kernels.lay_out(torch.zeros(4, 8).T)
    with pytest.raises(ValueError, match=r"groups=3 must be a power of two that divides 8"):
        kernels.lay_out(torch.zeros(4, 8), groups=3)
    with pytest.raises(ValueError, match=r"take_rows: ids span 0..4, but there are 4 rows"):
        kernels.take_rows(torch.zeros(4, 8), torch.tensor([0, 4]))
