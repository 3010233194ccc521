"""A group of ranks of one host that exchange CPU tensors through shared memory.

The native half, `kernels/native/shm.cpp`, moves and sums; this half makes the segment, finds peers and raises. The
segment is a memfd that peers open through /proc/<pid>/fd/<fd>: it has no name, so that nothing stays behind however
a rank dies.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor
from torch.distributed import Store

from shards.comm import CommError, tree_sum
from shards.kernels.check import check_tensor, dtype_code
from shards.tape import Recorder, Tape

MAX_RANKS = 64
"""kMaxRanks in shm.cpp."""
SLOT_BYTES = 1 << 20
"""Bytes a rank passes on at once; a group of n ranks has a segment of 2 x n times this, touched as it is used."""

_SUMS = {torch.float32: "shmcomm_sum_float32", torch.bfloat16: "shmcomm_sum_bfloat16"}
_REASONS = {
    1: "timed out after {timeout_s:g} s: rank {missing} of {size} did not come",
    2: "was stopped: the group was closed",
    3: "lost a peer: rank {missing} of {size} died, failed or closed the group",
    4: "was called with another operation, size or split on some rank of the {size}",
}
"""By enum Code of shm.cpp."""


class ShmComm:
    """One rank's membership of a shared-memory group; sums are those of `tree_sum`, bit for bit, at any size."""

    near = True

    def __init__(
        self,
        library: ctypes.CDLL,
        store: Store,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        """Meet the peers; returns once all of them are there.

        Args:
            library: the native library.
            store: where the group meets; its keys belong to this group alone.
            rank: this rank's place in the group.
            size: ranks of the group, 2 to 64.
            timeout_s: an operation, and this call, fails after this long without a peer.
            slot_bytes: a multiple of 128, at least 64 a rank.

        Raises:
            ValueError: size or slot_bytes out of range.
            CommError: a peer's segment cannot be opened, or a peer did not come.
        """
        if not 2 <= size <= MAX_RANKS:
            raise ValueError(f"a shared-memory group has 2 to {MAX_RANKS} ranks, got size={size}; use one_host=False")
        if slot_bytes % 128 or slot_bytes < 64 * size:
            raise ValueError(f"slot_bytes must be a multiple of 128 and at least {64 * size}, got {slot_bytes}")
        self.size = size
        self.rank = rank
        self._library = _declare(library)
        self._timeout_s = timeout_s
        self._timeout_ns = int(timeout_s * 1e9)
        self._busy = threading.Lock()
        self._recorded = False
        self._closing = threading.Lock()
        self._handle: int | None = None
        try:
            self._join(store, slot_bytes)
        except CommError:
            self.close()
            raise

    def _join(self, store: Store, slot_bytes: int) -> None:
        """Map the group's segment, made by rank 0 and opened by the others, and wait for everybody."""
        fd = -1
        try:
            if self.rank == 0:
                fd = os.memfd_create("moefleet-comm")
                os.ftruncate(fd, self._library.shmcomm_segment_bytes(self.size, slot_bytes))
                store.set("segment", str(fd))
            store.set(f"pid{self.rank}", str(os.getpid()))
            store.wait(["segment", *(f"pid{r}" for r in range(self.size))], timedelta(seconds=self._timeout_s))
            pids = [int(store.get(f"pid{r}")) for r in range(self.size)]
            if self.rank != 0:
                fd = os.open(f"/proc/{pids[0]}/fd/{int(store.get('segment'))}", os.O_RDWR)
            self._handle = self._library.shmcomm_attach(fd, self.rank, self.size, slot_bytes, _numbers(pids))
            if self._handle is None:
                raise CommError(f"rank {self.rank} of {self.size} cannot map the group's shared memory")
            # Rank 0's descriptor stays open until everybody has opened it.
            self.barrier()
        except CommError:
            raise
        except (OSError, RuntimeError) as error:
            raise CommError(
                f"rank {self.rank} of {self.size} cannot join the shared-memory group: {error}; ranks that do not "
                "share a host, a user and a process namespace need one_host=False"
            ) from error
        finally:
            if fd >= 0:
                os.close(fd)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks as a balanced binary tree by rank, in place where x is contiguous."""
        if x.dtype not in _SUMS:
            return self._sum_gathered(x)
        x = x.contiguous()
        self._call("all_reduce", getattr(self._library, _SUMS[x.dtype]), x.data_ptr(), x.numel())
        return x

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum in a new tensor, or for float32 in place."""
        if x.dtype != torch.float32 or dtype != torch.bfloat16:
            return self.all_reduce(x).to(dtype)
        check_tensor("x", x, torch.float32, tuple(x.shape))
        out = x.new_empty(x.shape, dtype=dtype)
        self._call("all_reduce", self._library.shmcomm_sum_to_bfloat16, x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Each rank makes the sums of some columns; results cross once, and the sums once more."""
        T, _, C = y_TKC.shape
        check_tensor("y", y_TKC, torch.float32, tuple(y_TKC.shape))
        if shared_TC is not None:
            check_tensor("shared", shared_TC, torch.float32, (T, C))
        return self._mix(y_TKC, weights_TK, None, 1, shared_TC, dtype)

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        """As `mix_sums`; a rank passes on the rows that it has."""
        T, K, _ = y_TKC.shape
        check_tensor("y", y_TKC, y_TKC.dtype, tuple(y_TKC.shape))
        check_tensor("ids", ids_TK, torch.int64, (T, K))
        return self._mix(y_TKC, weights_TK, ids_TK, held, None, y_TKC.dtype)[0]

    def _mix(
        self,
        y_TKC: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor | None,
        held: int,
        shared_TC: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        T, K, C = y_TKC.shape
        check_tensor("weights", weights_TK, torch.float32, (T, K))
        out_TC = y_TKC.new_empty((T, C), dtype=dtype)
        shared_out_TC = None if shared_TC is None else torch.empty_like(out_TC)
        ids, shared, shared_out = (None if x is None else x.data_ptr() for x in (ids_TK, shared_TC, shared_out_TC))
        self._call(
            "mix", self._library.shmcomm_mix, dtype_code("y", out_TC), y_TKC.data_ptr(), weights_TK.data_ptr(), ids,
            held, shared, out_TC.data_ptr(), shared_out, T, K, C,
        )  # fmt: skip
        return out_TC, shared_out_TC

    def _sum_gathered(self, x: Tensor) -> Tensor:
        """all_reduce of the dtypes that the native half cannot add."""
        wide = x.float() if x.dtype == torch.float16 else x
        return tree_sum(list(self.all_gather(wide[None]).unbind(0))).to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x, concatenated along the first axis in rank order."""
        x = x.contiguous()
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        self._call("all_gather", self._library.shmcomm_all_gather, x.data_ptr(), out.data_ptr(), x.nbytes)
        return out

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """src's x, in place where x is contiguous."""
        x = x.contiguous()
        self._call("broadcast", self._library.shmcomm_broadcast, x.data_ptr(), x.nbytes, src)
        return x

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        """Rows of x, cut by send_counts, one piece to each rank; the pieces received, in rank order.

        Raises:
            ValueError: counts that do not fit the group or x.
        """
        check_counts(self.size, x, send_counts, recv_counts)
        x = x.contiguous()
        out = x.new_empty((sum(recv_counts), *x.shape[1:]))
        row_bytes = x[:1].nbytes if x.shape[0] else out[:1].nbytes
        send = _numbers([count * row_bytes for count in send_counts])
        recv = _numbers([count * row_bytes for count in recv_counts])
        self._call("all_to_all", self._library.shmcomm_all_to_all, x.data_ptr(), out.data_ptr(), send, recv)
        return out

    def barrier(self) -> None:
        """Wait for every rank."""
        self._call("barrier", self._library.shmcomm_barrier)

    def close(self) -> None:
        """Leave the group: frees a thread that is inside of an operation, and fails the peers' further ones."""
        with self._closing:
            if self._handle is None:
                return
            self._library.shmcomm_stop(self._handle)
            with self._busy:
                self._library.shmcomm_detach(self._handle)
                self._handle = None

    def go_through(self, recorder: Recorder) -> None:
        """Call the library through a recorder from now on, whose tapes `play` can then play.

        Raises:
            ValueError: the group goes through another rank's already, on whose tapes its operations would lack.
        """
        if self._recorded:
            raise ValueError("the group's operations go onto the tapes of another rank; form a group for each")
        self._recorded = True
        self._library = _declare(cast("ctypes.CDLL", recorder))

    def play(self, tape: Tape, *, timed: bool) -> None:
        """Play a tape with operations of this group."""
        with self._busy:
            if self._handle is None:
                raise CommError("a step: the group was closed")
            failed = tape.play(timed=timed)
            if failed is not None:
                raise self._failure(*failed)

    def _call(self, name: str, function: Callable[..., int], *arguments: object) -> None:
        """Run one operation; ctypes lets go of the GIL meanwhile, so that another thread can close."""
        with self._busy:
            if self._handle is None:
                raise CommError(f"{name}: the group was closed")
            code = function(self._handle, *arguments, self._timeout_ns)
            if code:
                raise self._failure(name, code)

    def _failure(self, name: str, code: int) -> CommError:
        missing = self._library.shmcomm_missing(self._handle)
        names = ", ".join(str(r) for r in range(self.size) if missing >> r & 1)
        reason = _REASONS[code].format(timeout_s=self._timeout_s, missing=names, size=self.size)
        return CommError(f"{name} on rank {self.rank} {reason}")


def check_counts(size: int, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> None:
    """Refuse counts of an all_to_all that do not fit the group or x.

    Raises:
        ValueError: says which.
    """
    if not len(send_counts) == len(recv_counts) == size:
        raise ValueError(f"all_to_all over {size} ranks got {len(send_counts)} send and {len(recv_counts)} recv counts")
    if min(send_counts) < 0 or min(recv_counts) < 0 or sum(send_counts) != x.shape[0]:
        raise ValueError(f"send_counts {send_counts} must be cuts of the {x.shape[0]} rows, recv_counts {recv_counts}")


def _numbers(values: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the library's functions their C types."""
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    numbers = ctypes.POINTER(number)
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "shmcomm_segment_bytes": (number, [whole, number]),
        "shmcomm_attach": (pointer, [whole, whole, whole, number, numbers]),
        "shmcomm_stop": (None, [pointer]),
        "shmcomm_detach": (None, [pointer]),
        "shmcomm_missing": (ctypes.c_uint64, [pointer]),
        "shmcomm_sum_float32": (whole, [pointer, pointer, number, number]),
        "shmcomm_sum_bfloat16": (whole, [pointer, pointer, number, number]),
        "shmcomm_sum_to_bfloat16": (whole, [pointer, pointer, pointer, number, number]),
        "shmcomm_mix": (
            whole,
            [pointer, whole, pointer, pointer, pointer, number, pointer, pointer, pointer, *[number] * 4],
        ),
        "shmcomm_all_gather": (whole, [pointer, pointer, pointer, number, number]),
        "shmcomm_broadcast": (whole, [pointer, pointer, number, whole, number]),
        "shmcomm_barrier": (whole, [pointer, number]),
        "shmcomm_all_to_all": (whole, [pointer, pointer, pointer, numbers, numbers, number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
