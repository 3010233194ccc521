"""How the ranks of a group exchange tensors: the interface that models call.

`shards.collectives` implements it over torch.distributed (gloo, NCCL), `shards.shm` over shared memory of one host;
`LocalComm` is a group of one, `EchoComm` one rank in the place of several.
"""

from typing import Protocol

import torch
from torch import Tensor

from shards.mesh import Layout


class CommError(RuntimeError):
    """An operation of a group failed: a peer died, left or did not come in time, or the group was closed.

    The group is of no further use; ranks go on in a new one, of the next generation.
    """


class Comm(Protocol):
    """A group of ranks; every member calls the same operations in the same order.

    Every operation raises CommError when a peer is lost, does not come in time, or the group is closed.
    """

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        ...

    @property
    def rank(self) -> int:
        """This rank's place in the group."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; may reuse x.

        When deterministic, a balanced binary tree by rank (`tree_sum`); 16-bit floats are summed in float32.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Each rank's x (equal shapes), concatenated along the first axis in rank order."""
        ...

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """src's x (src is a place in the group; x has the same shape and dtype on all ranks)."""
        ...

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        """Rows of x, cut by send_counts, one piece to each rank; returns the pieces received, in rank order."""
        ...

    @property
    def near(self) -> bool:
        """Whether ranks read each other's memory, so that what a rank does not need costs it nothing."""
        ...

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`all_reduce` of float32 x, rounded to dtype; may reuse x."""
        ...

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of the ranks' parts, rounded to dtype, and of those of y_TKC the weighted sum over K, as `combine`.

        Args:
            y_TKC: float32 parts.
            weights_TK: float32, equal on all ranks.
            shared_TC: float32 parts of rows that are summed and rounded alone.

        Returns:
            [T, C] and, where there is a shared_TC, [T, C].
        """
        ...

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        """`combine` of rows that lie on several ranks -> [T, C].

        Args:
            y_TKC: rank ids_TK // held has the row of each pair; what others have in its place is not looked at, but
                has to be zero where ranks are not `near`.
        """
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def close(self) -> None:
        """Let go of the group's resources; also from another thread, to free a rank that hangs in an operation."""
        ...


class LocalComm:
    """A group of one rank: nothing moves."""

    size = 1
    rank = 0
    near = True

    def all_reduce(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """x itself."""
        assert src == 0
        return x

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        """x itself."""
        assert send_counts == recv_counts == [x.shape[0]]
        return x

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in dtype."""
        return x.to(dtype)

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of what is here, and the rows that stand alone."""
        return mixed(y_TKC.to(dtype), weights_TK), None if shared_TC is None else shared_TC.to(dtype)

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        """The weighted sum."""
        return mixed(y_TKC, weights_TK)

    def barrier(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to let go of."""


class EchoComm:
    """A group of which this rank plays all: what it sends to a rank comes back as sent by that rank. Nothing moves.

    Shapes are those of the real group. With whole experts spread over W ranks each pair of token and expert e meets
    expert e mod (E / W) here, as if the other ranks had sent as many tokens with choices of their own.
    """

    rank = 0
    near = False

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """x of every rank."""
        return x * self.size

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank."""
        return x.repeat(self.size, *[1] * (x.dim() - 1))

    def broadcast(self, x: Tensor, src: int) -> Tensor:
        """x of every rank."""
        return x

    def all_to_all(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> Tensor:
        """Each piece back."""
        assert send_counts == recv_counts
        return x

    def sum_to(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x of every rank."""
        return self.all_reduce(x).to(dtype)

    def mix_sums(
        self, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The parts of every rank are those here."""
        return sum_then_mix(self, y_TKC, weights_TK, shared_TC, dtype)

    def mix_rows(self, y_TKC: Tensor, ids_TK: Tensor, held: int, weights_TK: Tensor) -> Tensor:
        """Rows of every rank are those here."""
        return mixed(self.all_reduce(y_TKC), weights_TK)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to let go of."""


class Comms:
    """The three groups a rank belongs to: its lane (tp), its equals over the lanes (dp), and everybody (world)."""

    def __init__(self, *, tp: Comm, dp: Comm, world: Comm) -> None:
        self.tp = tp
        self.dp = dp
        self.world = world

    @staticmethod
    def local() -> "Comms":
        """A replica of one rank."""
        comm = LocalComm()
        return Comms(tp=comm, dp=comm, world=comm)

    @staticmethod
    def echo(layout: Layout) -> "Comms":
        """Groups of a replica's first rank, which plays all others: to try and to time one of many."""

        def group(size: int) -> Comm:
            return LocalComm() if size == 1 else EchoComm(size)

        return Comms(tp=group(layout.tp), dp=group(layout.dp), world=group(layout.world))

    def close(self) -> None:
        """Close every group."""
        for comm in {id(c): c for c in (self.tp, self.dp, self.world)}.values():
            comm.close()


def tree_sum(parts: list[Tensor]) -> Tensor:
    """Sum as a balanced binary tree: (p0 + p1) + (p2 + p3); for a count that is no power of two, a left one."""
    while len(parts) > 1:
        pairs = [torch.add(parts[i], parts[i + 1]) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + ([parts[-1]] if len(parts) % 2 else [])
    return parts[0]


def mixed(y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum over K, in order, in float32 -> [T, C] in y's dtype: the bits of the native `combine`."""
    total_TC = y_TKC.new_zeros((y_TKC.shape[0], y_TKC.shape[2]), dtype=torch.float32)
    for k in range(y_TKC.shape[1]):
        total_TC = total_TC + y_TKC[:, k].float() * weights_TK[:, k : k + 1]
    return total_TC.to(y_TKC.dtype)


def sum_then_mix(
    comm: Comm, y_TKC: Tensor, weights_TK: Tensor, shared_TC: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`mix_sums` of a group that sums everything on every rank first."""
    shared_TC = None if shared_TC is None else comm.sum_to(shared_TC, dtype)
    return mixed(comm.sum_to(y_TKC, dtype), weights_TK), shared_TC
