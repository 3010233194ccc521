"""Makes the pages of a large buffer before they are needed, in a thread of its own.

Memory files begin as holes: the system makes and clears a page when it is first touched, which costs four times what
writing it does. A prompt's KV, or a pull's, is not to pay for that.
"""

import ctypes
import os
import threading
from typing import Final

from torch import Tensor

from shards.host_memory import available_memory

_POPULATE_WRITE: Final = 23
"""Advice that makes pages as a write would, whatever is in them; of Linux 5.14, older kernels refuse it."""
_LEAST_PRIORITY: Final = 19
"""As Linux counts: cores are for whoever loads weights meanwhile."""
_PIECE_BYTES: Final = 256 << 10
"""Some 0.1 ms of the system's time, during which nobody in this process gets or gives back memory."""
_LOOK_BYTES: Final = 64 << 20
_SPARED_BYTES: Final = 1 << 30
"""Others on this machine may count on memory too: with less than so much left, pages come when they are needed."""


class FirstTouch:
    """Touches a buffer from its beginning to its end. Others may use it meanwhile: no byte of it changes.

    Args:
        buffer: flat, uint8, beginning on a page; kept until the thread has ended.
    """

    def __init__(self, buffer: Tensor) -> None:
        self._stopped = threading.Event()
        # Not a daemon, whatever the caller's thread is: Python kills those in its last moments, and one that then lets
        # go of a tensor over foreign memory takes the process down with it.
        threading.Thread(target=self._run, args=(buffer,), name="first-touch", daemon=False).start()

    def stop(self) -> None:
        """The buffer is not needed any more; returns at once."""
        self._stopped.set()

    def _run(self, buffer: Tensor) -> None:
        # Linux knows threads by their own ids here; other systems refuse, and have no memory files either.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        advise = ctypes.CDLL(None, use_errno=True).madvise
        address, end = buffer.data_ptr(), buffer.numel()
        for at in range(0, end, _PIECE_BYTES):
            size = ctypes.c_size_t(min(_PIECE_BYTES, end - at))
            if self._is_over() or (at % _LOOK_BYTES == 0 and _is_short()):
                return
            if advise(ctypes.c_void_p(address + at), size, _POPULATE_WRITE):
                return

    def _is_over(self) -> bool:
        return self._stopped.is_set() or not threading.main_thread().is_alive()


def _is_short() -> bool:
    available = available_memory()
    return available is not None and available < _SPARED_BYTES
