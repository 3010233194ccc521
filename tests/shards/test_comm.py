"""A group of one moves nothing, and the tree's order is what every sum over ranks agrees on."""

import torch
from typing_extensions import override

from shards.comm import Comms, LocalComm, tree_sum


def test_a_group_of_one_gives_back_its_tensor() -> None:
    comm = LocalComm()
    x = torch.arange(6.0).view(3, 2)
    assert comm.all_reduce(x) is x
    assert comm.all_gather(x) is x
    assert comm.broadcast(x, 0) is x
    assert comm.all_to_all(x, [3], [3]) is x
    comm.barrier()
    comm.close()


def test_a_tree_adds_neighbours_first_and_carries_the_odd_one() -> None:
    big = [1e8, 1.0, -1e8, 1.0, 3.0]
    parts = [torch.tensor([value]) for value in big]
    a, b, c, d, e = parts
    assert torch.equal(tree_sum(parts[:4]), (a + b) + (c + d))
    assert torch.equal(tree_sum(parts), ((a + b) + (c + d)) + e)
    assert torch.equal(tree_sum(parts[:3]), (a + b) + c)
    assert tree_sum([a]) is a


def test_a_tree_leaves_its_parts_as_they_were() -> None:
    parts = [torch.ones(2), torch.ones(2)]
    tree_sum(parts)
    assert parts[0].tolist() == [1.0, 1.0]


class _CountingComm(LocalComm):
    def __init__(self) -> None:
        self.closed = 0

    @override
    def close(self) -> None:
        self.closed += 1


def test_a_group_that_plays_two_parts_is_closed_once() -> None:
    world, dp = _CountingComm(), _CountingComm()
    Comms(tp=world, dp=dp, world=world).close()
    assert (world.closed, dp.closed) == (1, 1)


def test_a_replica_of_one_rank_has_one_local_group() -> None:
    comms = Comms.local()
    assert comms.tp is comms.dp is comms.world
    assert (comms.world.size, comms.world.rank) == (1, 0)
