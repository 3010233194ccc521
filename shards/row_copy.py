"""Copies many rows of bytes between two buffers of this process in one call, without holding Python's lock."""

import ctypes
from typing import Final

import numpy as np

from shards.kernels.library import declare, load_library

ByteArray = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

_POINTER: Final = ctypes.c_void_p
_NUMBER: Final = ctypes.c_int64
_STREAMED_BYTES: Final = 128 << 10
"""Fewer are left in the caches for whoever uses them next."""


class RowCopier:
    """Copies rows, by the compiled library where there is one."""

    def __init__(self) -> None:
        self._library = load_library()
        if self._library is not None:
            signature = [_POINTER, _POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER, _NUMBER]
            declare(self._library, {"copy_rows": signature})

    def copy(
        self,
        target: ByteArray,
        to: IntArray,
        source: ByteArray,
        at: IntArray,
        num_bytes: int,
        *,
        used_next: bool = False,
    ) -> None:
        """Row i is num_bytes bytes from at[i] of source to to[i] of target; the caller has checked the bounds.

        Args:
            used_next: the target is read at once, and had better be in the caches then.
        """
        if self._library is None:
            for there, here in zip(to.tolist(), at.tolist(), strict=True):
                target[there : there + num_bytes] = source[here : here + num_bytes]
            return
        to, at = np.ascontiguousarray(to), np.ascontiguousarray(at)
        streamed = not used_next and len(to) * num_bytes >= _STREAMED_BYTES
        self._library.copy_rows(
            target.ctypes.data, to.ctypes.data, source.ctypes.data, at.ctypes.data, len(to), num_bytes, streamed
        )
