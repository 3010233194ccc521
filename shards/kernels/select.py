"""Chooses the kernel set of a rank, once, when it loads."""

from typing import Literal

from shards.kernels.interface import Kernels
from shards.kernels.library import load_library
from shards.kernels.native import NativeKernels
from shards.kernels.torch_kernels import TorchKernels


def select_kernels(name: Literal["auto", "native", "torch"], device: str) -> Kernels:
    """The kernel set by that name; "auto" takes native on a CPU where its library is built, else torch.

    Raises:
        ValueError: native is asked for but cannot run here, or the name is unknown.
    """
    if name == "torch":
        return TorchKernels()
    if name not in ("auto", "native"):
        raise ValueError(f"kernels={name!r} is not one of auto, native, torch")
    on_cpu = device.partition(":")[0] == "cpu"
    library = load_library() if on_cpu else None
    if library is not None:
        return NativeKernels(library)
    if name == "auto":
        return TorchKernels()
    if not on_cpu:
        raise ValueError(f"kernels=native runs on device cpu only, got device={device}; use kernels=auto or torch")
    raise ValueError(
        "kernels=native: the compiled library shards/kernels/_native.so is missing; install a C++ compiler (g++ or "
        "clang++) and the package again, or run `python hatch_build.py` in its source tree, or use kernels=torch"
    )
