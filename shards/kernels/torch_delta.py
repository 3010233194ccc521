"""The gated delta rule in plain torch, token by token or in chunks.

S sequences, n tokens each, V heads, D head dim (Dk of keys, Dv of values), Z chunks of N tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
LONGEST_RECURRENT = 16


def gated_delta_rule(
    q_SnVD: Tensor, k_SnVD: Tensor, v_SnVD: Tensor, beta_SnV: Tensor, g_SnV: Tensor, state_SVDD: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the rule over n tokens from a state; all float32, q and k already normalised and q scaled.

    Returns:
        outputs [S, n, V, Dv] and the state after them [S, V, Dk, Dv].
    """
    if q_SnVD.shape[1] <= LONGEST_RECURRENT:
        return _recurrent(q_SnVD, k_SnVD, v_SnVD, beta_SnV, g_SnV, state_SVDD)
    return _chunked(q_SnVD, k_SnVD, v_SnVD, beta_SnV, g_SnV, state_SVDD)


def _recurrent(
    q_SnVD: Tensor, k_SnVD: Tensor, v_SnVD: Tensor, beta_SnV: Tensor, g_SnV: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for i in range(q_SnVD.shape[1]):
        k_SVD1 = k_SnVD[:, i].unsqueeze(-1)
        state = state * g_SnV[:, i, :, None, None].exp()
        error_SVD = (v_SnVD[:, i] - (state * k_SVD1).sum(-2)) * beta_SnV[:, i].unsqueeze(-1)
        state = state + k_SVD1 * error_SVD.unsqueeze(-2)
        outputs.append((state * q_SnVD[:, i].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1), state


def _chunked(
    q_SnVD: Tensor, k_SnVD: Tensor, v_SnVD: Tensor, beta_SnV: Tensor, g_SnV: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Within a chunk the updates form a unit lower-triangular system; solving it leaves one matmul a chunk."""
    n = q_SnVD.shape[1]
    q, k, v = (_cut(x) for x in (q_SnVD, k_SnVD, v_SnVD))
    beta, g = _cut(beta_SnV.unsqueeze(-1)), _cut(g_SnV.unsqueeze(-1)).squeeze(-1)
    decay_SVZN = g.cumsum(-1)
    # exp only of what is kept: above the diagonal the difference is positive and may overflow.
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    between = (decay_SVZN.unsqueeze(-1) - decay_SVZN.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    system = (k * beta) @ k.transpose(-1, -2) * between
    from_start = decay_SVZN.exp().unsqueeze(-1)
    sides = torch.cat((v * beta, k * beta * from_start), dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    values, reads = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    inner = q @ k.transpose(-1, -2) * between
    q = q * from_start
    k = k * (decay_SVZN[..., -1:] - decay_SVZN).exp().unsqueeze(-1)
    outputs = []
    for z in range(q.shape[2]):
        new = values[:, :, z] - reads[:, :, z] @ state
        outputs.append(q[:, :, z] @ state + inner[:, :, z] @ new)
        state = state * decay_SVZN[:, :, z, -1, None, None].exp() + k[:, :, z].transpose(-1, -2) @ new
    return torch.cat(outputs, dim=2).transpose(1, 2)[:, :n], state


def _cut(x_SnVD: Tensor) -> Tensor:
    """[S, n, V, D] -> [S, V, chunks, CHUNK, D], zeros behind the end."""
    padding = -x_SnVD.shape[1] % CHUNK
    return functional.pad(x_SnVD, (0, 0, 0, 0, 0, padding)).transpose(1, 2).unflatten(2, (-1, CHUNK)).contiguous()
