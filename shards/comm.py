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
