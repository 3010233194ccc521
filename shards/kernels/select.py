"""Chooses the kernel set of a rank, once, when it loads."""

from typing import Literal

from shards.kernels.interface import Kernels
from shards.kernels.torch_kernels import TorchKernels


def select_kernels(name: Literal["auto", "native", "torch"], device: str) -> Kernels:
    """The kernel set by that name; "auto" takes native on a CPU where its library is built, else torch.

    Raises:
        ValueError: native is asked for but cannot run here, or the name is unknown.
    """
    if name not in ("auto", "native", "torch"):
        raise ValueError(f"kernels={name!r} is not one of auto, native, torch")
    if name == "native":
        raise ValueError(f"kernels=native is not built, device={device}; use kernels=torch")
    return TorchKernels()
