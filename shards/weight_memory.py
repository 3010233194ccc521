"""Memory for weights: on a CPU in huge pages, where the system gives them.

Reading weights is most of a decode step. With pages of 4 KiB every few rows of a matrix miss the processor's table of
addresses, which costs a virtual machine more than half of its memory bandwidth.
"""

import ctypes
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes; of x86-64, and of arm64 with pages of 4 KiB."""
_MADV_HUGEPAGE = 14


def empty_weights(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor of uninitialised weights; begins on a huge page where it is as large as one and on a CPU."""
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if device.type != "cpu" or num_bytes < HUGE_PAGE or not sys.platform.startswith("linux"):
        return torch.empty(shape, dtype=dtype, device=device)
    room = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    begin = -room.data_ptr() % HUGE_PAGE
    # Advice only: a kernel that has no huge pages refuses, and the weights lie in small ones.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(room.data_ptr() + begin), ctypes.c_size_t(num_bytes // HUGE_PAGE * HUGE_PAGE), _MADV_HUGEPAGE
    )
    return room[begin : begin + num_bytes].view(dtype).view(shape)
