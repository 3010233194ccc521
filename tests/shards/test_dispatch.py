import pytest
import torch

from shards.comm import Comms, EchoComm
from shards.dispatch import collect, dispatch, plan_exchange
from shards.mesh import Layout, Place
from tests.support.thread_comm import on_every_rank


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_pair_visits_the_rank_of_its_expert_and_comes_back_to_its_place(ranks: int) -> None:
    num_experts, top_k = 8, 3

    def work(place: Place, comms: Comms) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(place.rank)
        # The last rank has no token of its own.
        tokens = 0 if place.rank == ranks - 1 and ranks > 1 else 5 + place.rank
        ids_NK = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k]
        x_NC = torch.randn(tokens, 4, generator=generator)
        exchange = plan_exchange(comms.world, ids_NK, num_experts)
        x_RC = dispatch(comms.world, exchange, x_NC)
        first_expert = place.rank * num_experts // ranks
        experts_R = exchange.local_experts_R + first_expert
        assert x_RC.shape[0] == len(experts_R) == sum(exchange.recv_counts)
        y_NKC = collect(comms.world, exchange, x_RC * (experts_R + 1).unsqueeze(1))
        return y_NKC, x_NC.unsqueeze(1) * (ids_NK + 1).unsqueeze(2)

    for y_NKC, expected_NKC in on_every_rank(Layout(tp=ranks), work):
        assert torch.equal(y_NKC, expected_NKC)


def test_pairs_reach_an_expert_in_the_order_of_their_tokens() -> None:
    comms = Comms.local()
    ids_NK = torch.tensor([[2, 0], [0, 2], [2, 1]])

    exchange = plan_exchange(comms.world, ids_NK, 3)

    assert exchange.pairs_P.tolist() == [1, 2, 5, 0, 3, 4]
    assert exchange.local_experts_R.tolist() == [0, 0, 1, 2, 2, 2]


def test_an_echo_sends_each_pair_to_the_expert_that_is_held_in_its_place() -> None:
    ids_NK = torch.tensor([[0, 5], [7, 2], [4, 3]])
    world = EchoComm(4)
    exchange = plan_exchange(world, ids_NK, 8)
    assert exchange.send_counts == exchange.recv_counts
    assert sorted(exchange.local_experts_R.tolist()) == sorted((ids_NK % 2).flatten().tolist())
    x_NC = torch.arange(3.0).unsqueeze(1)
    back_NKC = collect(world, exchange, dispatch(world, exchange, x_NC))
    assert torch.equal(back_NKC, x_NC.unsqueeze(1).expand(3, 2, 1))
