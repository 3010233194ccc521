"""Weights lie where the processor reads them fast."""

import pytest
import torch

from shards.weight_memory import HUGE_PAGE, empty_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_begin_on_a_huge_page_and_hold_what_is_written(dtype: torch.dtype) -> None:
    weights = empty_weights((3, 700, 1000), dtype, CPU)
    assert weights.shape == (3, 700, 1000)
    assert weights.dtype == dtype
    assert weights.is_contiguous()
    assert weights.data_ptr() % HUGE_PAGE == 0
    weights.fill_(2)
    assert (weights == 2).all()


def test_small_and_empty_weights_are_plain_tensors() -> None:
    assert empty_weights((7,), torch.float32, CPU).shape == (7,)
    assert empty_weights((0, 5), torch.float32, CPU).numel() == 0
