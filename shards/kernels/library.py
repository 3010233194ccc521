"""Finds and opens the compiled library that native kernels and the shared-memory communicator call."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARY = Path(__file__).with_name("_native.so")
ABI = 7


def load_library() -> ctypes.CDLL | None:
    """Open the library; None where it has not been built.

    Raises:
        ValueError: the file is of another version of the sources, or cannot be loaded here.
    """
    if not LIBRARY.exists():
        return None
    remedy = "build it again with `python hatch_build.py` in the source tree, or install the package again"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        found = int(library.kernels_abi())
    except (OSError, AttributeError) as error:
        raise ValueError(f"{LIBRARY} cannot be used ({error}); {remedy}, or remove it and use kernels=torch") from error
    if found != ABI:
        raise ValueError(f"{LIBRARY} is version {found}, this package needs {ABI}; {remedy}")
    return library


def declare(library: ctypes.CDLL, signatures: Mapping[str, Sequence[type]]) -> None:
    """Tell ctypes the argument types of functions that return an int or nothing."""
    for name, argtypes in signatures.items():
        function = getattr(library, name)
        function.argtypes = list(argtypes)
        function.restype = ctypes.c_int
