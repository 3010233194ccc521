"""Sends tokens to the ranks that hold their experts and brings the results back.

N tokens of this rank, K experts a token, P = N * K pairs, R pairs that arrive here, E experts of the model, W ranks,
C hidden size. Expert e lives on rank e // (E / W).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.comm import Comm


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Which (token, expert) pairs go where in one layer of one step."""

    pairs_P: Tensor
    """Pair indices (token * K + k) in sending order: by expert, then by token."""
    top_k: int
    send_counts: list[int]
    recv_counts: list[int]
    local_experts_R: Tensor
    """For each pair that arrives, which of the experts held here it wants."""


def plan_exchange(world: Comm, ids_NK: Tensor, num_experts: int) -> Exchange:
    """Tell every rank how many pairs each of its experts gets from here; one all-to-all of E counts."""
    experts_here = num_experts // world.size
    ids_P = ids_NK.flatten()
    sent_E = torch.bincount(ids_P, minlength=num_experts)
    even = [experts_here] * world.size
    arriving_WE = world.all_to_all(sent_E, even, even).view(world.size, experts_here)
    local_WE = torch.arange(experts_here, device=ids_P.device).repeat(world.size)
    return Exchange(
        pairs_P=torch.argsort(ids_P, stable=True),
        top_k=ids_NK.shape[1],
        send_counts=sent_E.view(world.size, -1).sum(1).tolist(),
        recv_counts=arriving_WE.sum(1).tolist(),
        local_experts_R=local_WE.repeat_interleave(arriving_WE.flatten()),
    )


def dispatch(world: Comm, exchange: Exchange, x_NC: Tensor) -> Tensor:
    """Each pair's token to the rank of its expert -> the rows that arrive here [R, C]."""
    rows_PC = x_NC[exchange.pairs_P // exchange.top_k]
    return world.all_to_all(rows_PC, exchange.send_counts, exchange.recv_counts)


def collect(world: Comm, exchange: Exchange, y_RC: Tensor) -> Tensor:
    """Each arrived pair's result back to where it came from -> [N, K, C] in the order of the tokens' experts."""
    back_PC = world.all_to_all(y_RC, exchange.recv_counts, exchange.send_counts)
    y_PC = torch.empty_like(back_PC)
    y_PC[exchange.pairs_P] = back_PC
    return y_PC.view(-1, exchange.top_k, back_PC.shape[1])
