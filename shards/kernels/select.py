"""Chooses the kernel set of a rank, once, when it loads."""

import logging
from functools import cache
from typing import Literal

from shards.kernels.interface import Kernels
from shards.kernels.library import load_library
from shards.kernels.native import NativeKernels
from shards.kernels.torch_kernels import TorchKernels

_LOG = logging.getLogger(__name__)


def select_kernels(name: Literal["auto", "native", "torch", "triton"], device: str) -> Kernels:
    """The kernel set by that name; "auto" takes native on a CPU, triton on CUDA, and torch where that cannot run.

    Raises:
        ValueError: native or triton is asked for but cannot run here, or the name is unknown.
    """
    if name not in ("auto", "native", "torch", "triton"):
        raise ValueError(f"kernels={name!r} is not one of auto, native, torch, triton")
    on_cpu = device.partition(":")[0] == "cpu"
    if name == "torch":
        return TorchKernels()
    if name == "triton" or (name == "auto" and not on_cpu):
        return _select_triton(device, asked=name == "triton")
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


def _select_triton(device: str, *, asked: bool) -> Kernels:
    found = _load_triton()
    if found is None:
        if asked:
            raise ValueError(
                "kernels=triton: the package triton is missing; install moefleet[cuda], or use kernels=torch"
            )
        return TorchKernels()
    kernels, interpreted = found
    if device.partition(":")[0] == "cpu" and not interpreted:
        raise ValueError(
            f"kernels=triton runs on device cuda (on a cpu in Triton's interpreter only), got device={device}; "
            "use kernels=auto or torch"
        )
    return kernels


@cache
def _load_triton() -> tuple[Kernels, bool] | None:
    """The Triton kernels, and whether Triton interprets them; None where the package is missing, said once."""
    try:
        # Lazy: triton is large, and there for machines with a GPU only.
        from triton import knobs

        from shards.kernels.triton_kernels import TritonKernels
    except ModuleNotFoundError as error:
        _LOG.info("%s: CUDA runs the plain torch kernels; install moefleet[cuda] for faster ones", error)
        return None
    return TritonKernels(), knobs.runtime.interpret
