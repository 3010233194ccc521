"""A torch.distributed group of two, a source rank and a rank that reads it: gloo between CPUs, NCCL between GPUs."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore

from cluster.wire import listen
from router.errors import HandoffError

SOURCE, READER = 0, 1
"""Their ranks in the group."""


def open_store(host: str) -> TCPStore:
    """A rendezvous store on a free port of `host` alone; lives in this process."""
    # Left to itself the store listens on every interface. It closes the socket at its end.
    with listen(host) as listener:
        port = listener.getsockname()[1]
        return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def join_store(host: str, port: int, *, timeout_s: float) -> Store:
    """The store that another process opened.

    Raises:
        HandoffError: it cannot be reached.
    """
    try:
        timeout = timedelta(seconds=timeout_s)
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise HandoffError(f"hand-off: the source's store at {host}:{port} cannot be reached: {error}") from error


def check_backend(device: str) -> None:
    """Whether this build of torch can form pairs on a device, "cpu" or "cuda".

    Raises:
        ValueError: it lacks the backend.
    """
    backend, there = ("nccl", dist.is_nccl_available()) if device == "cuda" else ("gloo", dist.is_gloo_available())
    if not there:
        raise ValueError(f"kv_transport=p2p on device={device} needs a torch with {backend}; use kv_transport=tcp")


class _Group(Protocol):
    """What a pair uses of torch's process groups."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        """Begin to send one tensor to a rank."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        """Begin to receive one tensor from a rank."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transfer:
    """One payload on its way."""

    payload: Tensor
    work: dist.Work


class Pair:
    """One end of a group of two of its own, beside all other groups of the process; used by one thread at a time.

    Args:
        store: where both ends meet.
        name: of this group and no other in the store.
        rank: SOURCE or READER.
        host: address of the interface to bind.
        device: where payloads lie.
        timeout_s: longest wait for the other end.

    Raises:
        HandoffError: the other end did not come.
    """

    def __init__(
        self, store: Store, name: str, *, rank: int, host: str, device: torch.device, timeout_s: float
    ) -> None:
        self._other = 1 - rank
        self._on_cuda = device.type == "cuda"
        own, timeout = PrefixStore(f"kv/{name}", store), timedelta(seconds=timeout_s)
        own.set_timeout(timeout)
        try:
            made = _nccl(own, rank, timeout) if self._on_cuda else _gloo(own, rank, host, timeout)
            self._group: _Group | None = made
        except RuntimeError as error:
            raise HandoffError(f"hand-off: the two ranks could not form a group: {error}") from error

    def start_send(self, payload: Tensor) -> Transfer:
        """Begin to send a payload that the other end knows the length of; it must not change until `finish`.

        Raises:
            HandoffError: the other end is gone.
        """
        return self._start(payload, sends=True)

    def start_receive(self, room: Tensor) -> Transfer:
        """Begin to fill a tensor with the next payload.

        Raises:
            HandoffError: the other end is gone.
        """
        return self._start(room, sends=False)

    def _start(self, tensor: Tensor, *, sends: bool) -> Transfer:
        group = self._group
        if group is None:
            raise HandoffError("hand-off: the pair was closed")
        try:
            start = group.send if sends else group.recv
            return Transfer(payload=tensor, work=start([tensor], self._other, 0))
        except RuntimeError as error:
            raise HandoffError(f"hand-off: the other rank of the pair was lost: {error}") from error

    def finish(self, transfer: Transfer, *, timeout_s: float) -> None:
        """Wait until a payload is sent or here.

        Raises:
            HandoffError: the other end is gone, takes nothing or sends nothing.
        """
        try:
            transfer.work.wait(timedelta(seconds=max(timeout_s, 1e-3)))
            if self._on_cuda:
                # NCCL's wait is the stream's.
                torch.cuda.current_stream(transfer.payload.device).synchronize()
        except RuntimeError as error:
            raise HandoffError(f"hand-off: the other rank of the pair was lost: {error}") from error

    def close(self) -> None:
        """Leave the group: the other end gets HandoffError. An operation under way here ends by its own timeout."""
        self._group = None


# torch's stubs know little of these two classes, nothing of `_Options`; what they lack is in `_Group`.
def _gloo(store: Store, rank: int, host: str, timeout: timedelta) -> _Group:
    options = dist.ProcessGroupGloo._Options()  # pyrefly: ignore[missing-attribute]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return cast("_Group", dist.ProcessGroupGloo(store, rank, 2, options))


def _nccl(store: Store, rank: int, timeout: timedelta) -> _Group:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return cast("_Group", dist.ProcessGroupNCCL(store, rank, 2, options))
