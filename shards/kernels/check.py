"""Refuses tensors whose bytes the compiled library would misread."""

import torch
from torch import Tensor

# The library's numbers of the dtypes it computes in.
_CODES = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(name: str, x: Tensor) -> int:
    """The library's number of x's dtype.

    Raises:
        ValueError: the library does not compute in it.
    """
    code = _CODES.get(x.dtype)
    if code is None:
        raise ValueError(f"{name} is {x.dtype}; native kernels take float32 and bfloat16, kernels=torch takes others")
    return code


def check_tensor(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse x unless it is a contiguous CPU tensor of that dtype and shape.

    Raises:
        ValueError: naming the tensor, what it is and what it should be.
    """
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        found = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
        raise ValueError(f"{name} is {found}; native kernels need {dtype} {list(shape)}, contiguous, on cpu")


def check_tensors(like: Tensor, **tensors: tuple[Tensor, tuple[int, ...]]) -> int:
    """Check (tensor, shape) pairs for like's dtype, and return the library's number of that dtype."""
    code = dtype_code(next(iter(tensors)), like)
    for name, (x, shape) in tensors.items():
        check_tensor(name, x, like.dtype, shape)
    return code
