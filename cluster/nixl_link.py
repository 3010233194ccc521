"""Reads of a remote rank's memory by NIXL, NVIDIA's library for moving KV: UCX picks the way, RDMA where there is any.

The source's end does nothing for a read. Readers find each other's memory by what the KV server tells of it.
"""

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Final, Protocol
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from cluster.recut import Rows
from router.errors import HandoffError

_ADDRESS: Final = struct.Struct("<Q")
_SPIN_S: Final = 200e-6
"""A read of a frame takes about as long; then it is looked at now and then."""
_NAP_S: Final = 100e-6


class _Agent(Protocol):
    """What is used of `nixl_agent`, which has no types; descriptors and handles are its own."""

    def register_memory(self, regions: list[tuple[int, int, int, str]], mem_type: str) -> object: ...
    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> str: ...
    def get_xfer_descs(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], mem_type: str) -> object: ...
    def initialize_xfer(self, operation: str, local: object, remote: object, agent: str) -> object: ...
    def transfer(self, handle: object) -> str: ...
    def check_xfer_state(self, handle: object) -> str: ...
    def release_xfer_handle(self, handle: object) -> None: ...


def check_nixl() -> None:
    """Whether the library is here.

    Raises:
        ValueError: it is not installed.
    """
    if find_spec("nixl") is None:
        raise ValueError("kv_transport=nixl needs the package nixl; pip install moefleet[nixl] or use kv_transport=tcp")


def _make_agent(*, serves: bool) -> _Agent:
    """Args:
    serves: others read from here. A thread of the library's then looks for them all the time, at half a core; who only
        reads gets on by asking how far a read is.
    """
    with _told("cannot be set up; use kv_transport=tcp on both pools, or"):
        # Not at the top: it is optional, and loads UCX.
        api = import_module("nixl._api")
        agent: _Agent = api.nixl_agent(uuid4().hex, api.nixl_agent_config(enable_prog_thread=serves, backends=["UCX"]))
    return agent


@cache
def _errors() -> tuple[type[Exception], ...]:
    bindings = import_module("nixl._bindings")
    return tuple(getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))


@contextmanager
def _told(problem: str) -> Iterator[None]:
    """The library's errors, which have no class in common, as HandoffError."""
    try:
        yield
    except _errors() as error:
        raise HandoffError(f"hand-off: NIXL {problem} see what it logs ({type(error).__name__}: {error})") from error


def _place(memory: Tensor) -> tuple[str, int]:
    """Kind of memory and number of its device."""
    return ("VRAM", memory.device.index or 0) if memory.device.type == "cuda" else ("DRAM", 0)


class NixlSource:
    """A rank's buffer, open to readers.

    Raises:
        ValueError: as `check_nixl`.
        HandoffError: the library does not start, or cannot use this memory.
    """

    def __init__(self, buffer: Tensor) -> None:
        check_nixl()
        self._agent = _make_agent(serves=True)
        kind, device = _place(buffer)
        with _told("cannot open the cache to readers;"):
            self._agent.register_memory([(buffer.data_ptr(), buffer.numel(), device, "")], kind)
        self.description = _ADDRESS.pack(buffer.data_ptr()) + self._agent.get_agent_metadata()
        """What a reader needs to know."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NixlRead:
    """One payload on its way."""

    payload: Tensor
    handle: object


class NixlLink:
    """One reader's end; used by one thread at a time.

    Args:
        description: of the source.

    Raises:
        ValueError: as `check_nixl`.
        HandoffError: the library does not start, or cannot use the description.
    """

    def __init__(self, description: bytes) -> None:
        check_nixl()
        self._agent = _make_agent(serves=False)
        self._rooms: list[Tensor] = []
        self._closed = False
        (self._address,) = _ADDRESS.unpack_from(description)
        with _told("does not understand the source;"):
            self._source = self._agent.add_remote_agent(description[_ADDRESS.size :])

    def register(self, room: Tensor) -> None:
        """Let reads write a tensor; it is kept as long as the agent, which may write late."""
        kind, device = _place(room)
        with _told("cannot use memory of this rank;"):
            self._agent.register_memory([(room.data_ptr(), room.numel(), device, "")], kind)
        self._rooms.append(room)

    def start_read(self, room: Tensor, parts: Sequence[Rows]) -> NixlRead:
        """Begin to fill a registered room with rows of the source, one after the other.

        Raises:
            HandoffError: the source is gone, or has no such rows.
        """
        kind, device = _place(room)
        offsets = np.concatenate([part.offsets for part in parts])
        sizes = np.concatenate([np.full(len(part.offsets), part.num_bytes, np.int64) for part in parts])
        packed = np.cumsum(sizes) - sizes
        devices = np.full(len(sizes), device, np.int64)
        with _told("cannot read from the source;"):
            local, remote = (
                self._agent.get_xfer_descs(np.stack([base + at, sizes, devices], axis=1).astype(np.uint64), kind)
                for base, at in ((room.data_ptr(), packed), (self._address, offsets))
            )
            handle = self._agent.initialize_xfer("READ", local, remote, self._source)
            self._agent.transfer(handle)
        return NixlRead(payload=room[: int(sizes.sum())], handle=handle)

    def finish(self, read: NixlRead, *, timeout_s: float) -> None:
        """Wait until a payload is here.

        Raises:
            HandoffError: the source is gone or too slow.
        """
        began = time.monotonic()
        while (state := self._state(read)) not in ("DONE", "ERR"):
            waited_s = time.monotonic() - began
            if self._closed or waited_s > timeout_s:
                raise HandoffError(f"hand-off: a NIXL read has not ended within {waited_s:.3g} s")
            if waited_s > _SPIN_S:
                time.sleep(_NAP_S)
        if state == "ERR":
            raise HandoffError("hand-off: a NIXL read failed; the source may be gone")
        self._agent.release_xfer_handle(read.handle)
        if read.payload.device.type == "cuda":
            # Not for the whole device, which would spoil a graph that another thread captures.
            torch.cuda.current_stream(read.payload.device).synchronize()

    def _state(self, read: NixlRead) -> str:
        with _told("lost the source;"):
            return self._agent.check_xfer_state(read.handle)

    def close(self) -> None:
        """Have a thread inside of `finish` give up."""
        self._closed = True
