"""Makes a replica's groups of ranks, and is the only caller of torch.distributed's operations on them."""

import ctypes
import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shards.comm import Comm, CommError, Comms, LocalComm, mixed, sum_then_mix, tree_sum
from shards.kernels.library import load_library
from shards.mesh import Place, dp_groups, tp_groups
from shards.shm import MAX_RANKS, ShmComm, check_counts

TIMEOUT_S = 60.0
"""An operation that waits this long for a peer fails."""

_SLICE = timedelta(milliseconds=100)
"""Longest that a close leaves a waiting thread."""
_DESTROY_S = 1.0
"""A destroy that nobody holds up takes 2 to 25 ms."""


def make_comms(
    store: dist.Store,
    place: Place,
    *,
    generation: int,
    device: str,
    deterministic: bool,
    one_host: bool,
    timeout_s: float = TIMEOUT_S,
) -> Comms:
    """Form the tp, dp and world groups of one rank; every rank of the layout calls this.

    Groups of ranks on one host's CPU go over shared memory where the native library is there, others over
    torch.distributed: gloo on the CPU, NCCL on CUDA, of which a process can be in one generation at a time.

    Args:
        store: the same store for all ranks, such as a TCPStore.
        place: which rank of which layout this is.
        generation: 0, then one more each time the group re-forms; keeps the keys of a store apart.
        device: "cpu", "cuda" or "cuda:<index>"; "cuda" is the current device.
        deterministic: sums go in the fixed order of `tree_sum`.
        one_host: all ranks run on this host, and see each other's processes.
        timeout_s: an operation that waits this long for a peer fails.

    Raises:
        CommError: the ranks could not meet.
        ValueError: the device is neither cpu nor cuda, or timeout_s is not positive.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be positive, got {timeout_s}")
    if place.layout.world == 1:
        return Comms.local()
    store = dist.PrefixStore(f"gen{generation}", store)
    library = load_library() if one_host and kind == "cpu" and place.layout.world <= MAX_RANKS else None
    if library is None:
        return _dist_comms(store, place, kind, deterministic=deterministic, timeout_s=timeout_s)
    return _shm_comms(library, store, place, timeout_s)


def _shm_comms(library: ctypes.CDLL, store: dist.Store, place: Place, timeout_s: float) -> Comms:
    """The groups over shared memory, a segment each."""

    def make(name: str, groups: list[list[int]], index: int) -> Comm:
        ranks = groups[index]
        own = dist.PrefixStore(f"{name}{index}", store)
        return ShmComm(library, own, rank=ranks.index(place.rank), size=len(ranks), timeout_s=timeout_s)

    return _split(place, make("world", [list(range(place.layout.world))], 0), make)


def _dist_comms(store: dist.Store, place: Place, kind: str, *, deterministic: bool, timeout_s: float) -> Comms:
    """The groups over torch.distributed."""
    timeout = timedelta(seconds=timeout_s)

    def make(name: str, groups: list[list[int]], index: int) -> Comm:
        try:
            # Every rank makes all groups, in the same order.
            made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
        except RuntimeError as error:
            raise CommError(f"rank {place.rank} could not form its {name} group: {error}") from error
        own = made[index]
        assert isinstance(own, dist.ProcessGroup)
        return DistComm(own, deterministic=deterministic)

    backend = "nccl" if kind == "cuda" else "gloo"
    world_size = place.layout.world
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise CommError(f"rank {place.rank} of {world_size} could not meet the others: {error}") from error
    world = dist.group.WORLD
    assert world is not None
    return _split(place, DistComm(world, deterministic=deterministic), make)


def _split(place: Place, world: Comm, make: Callable[[str, list[list[int]], int], Comm]) -> Comms:
    """The lane's and the lanes' groups beside the world's; one of all ranks is the world's, one of one is local."""

    def group(name: str, groups: list[list[int]], index: int) -> Comm:
        ranks = len(groups[index])
        if ranks == 1:
            return LocalComm()
        return world if ranks == world.size else make(name, groups, index)

    try:
        tp = group("tp", tp_groups(place.layout), place.dp_rank)
        dp = group("dp", dp_groups(place.layout), place.tp_rank)
    except CommError:
        world.close()
        raise
    return Comms(tp=tp, dp=dp, world=world)


class DistComm:
    """One rank's membership of a torch.distributed group."""

    near = False

    def __init__(self, group: dist.ProcessGroup, *, deterministic: bool) -> None:
        self.size = group.size()
        self.rank = group.rank()
        self._group = group
        self._on_cuda = group.name() == "nccl"
        self._deterministic = deterministic
        self._closing = threading.Lock()
        self._closed = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; deterministic: all parts gathered and added as `tree_sum` does, 16-bit in float32."""
        if self._deterministic:
            parts = list(self.all_gather(x[None]).unbind(0))
            if x.dtype in (torch.bfloat16, torch.float16):
                parts = [part.float() for part in parts]
            return tree_sum(parts).to(x.dtype)
        x = x.contiguous()
        self._run("all_reduce", lambda: dist.all_reduce(x, group=self._group, async_op=True))
        return x

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`all_reduce`, rounded."""
        return self.all_reduce(x).to(dtype)

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Sums everywhere, then the weighted sums."""
        return sum_then_mix(self, y_TKC, weights_TK, shared_TC, dtype)

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        """Adds the zeros of all ranks but one to each row, then the weighted sums."""
        return mixed(self.all_reduce(y_TKC), weights_TK)

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x, concatenated along the first axis in rank order."""
        x = x.contiguous()
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if x.numel():
            self._run("all_gather", lambda: dist.all_gather_single(out, x, group=self._group, async_op=True))
        return out

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """src's x, in place where x is contiguous."""
        x = x.contiguous()
        if x.numel():
            self._run("broadcast", lambda: dist.broadcast(x, group=self._group, group_src=src, async_op=True))
        return x

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        """Rows of x, cut by send_counts, one piece to each rank; the pieces received, in rank order.

        Raises:
            ValueError: counts that do not fit the group or x.
        """
        check_counts(self.size, x, send_counts, recv_counts)
        x = x.contiguous()
        out = x.new_empty((sum(recv_counts), *x.shape[1:]))
        self._run(
            "all_to_all",
            lambda: dist.all_to_all_single(out, x, recv_counts, send_counts, group=self._group, async_op=True),
        )
        return out

    def barrier(self) -> None:
        """Wait for every rank; on CUDA also for this rank's device."""
        flag = torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device()) if self._on_cuda else "cpu")
        self._run("barrier", lambda: dist.all_reduce(flag, group=self._group, async_op=True))
        if self._on_cuda:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Leave the group, the whole process group with the world's; frees a thread that is inside of an operation."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            if self._group is not dist.group.WORLD:
                # It goes with the world's.
                return
            if self._on_cuda:
                # An ordinary destroy waits for kernels that wait for a dead peer.
                self._group.abort()
            # gloo waits here for a peer that hangs, until the operation's timeout; torch has forgotten the group by
            # then, so that the next generation can form meanwhile.
            destroyer = threading.Thread(target=dist.destroy_process_group, daemon=True, name="destroy-group")
            destroyer.start()
            destroyer.join(_DESTROY_S)

    def _run(self, name: str, start: Callable[[], dist.Work | None]) -> None:
        """Start an operation and wait for its end; on CUDA the device's stream waits instead."""
        if self._closed:
            raise CommError(f"{name}: the group was closed")
        try:
            work = start()
            if work is not None:
                self._wait(work)
        except (RuntimeError, ValueError) as error:
            # torch raises ValueError where another thread has destroyed the group.
            reason = "the group was closed" if self._closed else str(error)
            raise CommError(f"{name} on rank {self.rank} of {self.size} failed: {reason}") from error

    def _wait(self, work: dist.Work) -> None:
        """Wait in slices, because gloo lets go of a waiting thread only when its operation ends."""
        if self._on_cuda:
            work.wait()
            return
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                if work.is_completed():
                    # Its own failure, or its success since the slice ended.
                    work.wait()
                    return
                if self._closed:
                    raise
