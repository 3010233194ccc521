"""The gated delta net in plain torch; its rule token by token or in chunks.

S sequences, n tokens each, V heads, D head dim (Dk of keys, Dv of values), Z chunks of N tokens.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

L2_EPS = 1e-6
CHUNK = 64
LONGEST_RECURRENT = 16


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    state_NCW: Tensor,
    slots_S: Tensor,
    query_start_S1: Tensor,
    fresh_S: Tensor,
    advance_S: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution and SiLU; the state's rows are advanced in place."""
    starts = query_start_S1.tolist()
    before_SCW = state_NCW[slots_S].masked_fill(fresh_S.view(-1, 1, 1), 0)
    out_TC = torch.empty_like(x_TC)
    for rows, tokens in _runs(starts):
        x_SCT = x_TC[tokens].view(rows.stop - rows.start, -1, x_TC.shape[1]).transpose(1, 2)
        padded = torch.cat((before_SCW[rows], x_SCT), dim=2)
        y_SCT = functional.silu(functional.conv1d(padded, weight_CW.unsqueeze(1), groups=weight_CW.shape[0]))
        out_TC[tokens] = y_SCT.transpose(1, 2).reshape(-1, x_TC.shape[1])
        _advance(state_NCW, slots_S[rows], padded[:, :, x_SCT.shape[2] :], advance_S, rows)
    return out_TC


def delta_gates(b_TV: Tensor, a_TV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor) -> tuple[Tensor, Tensor]:
    """beta = sigmoid(b) and g = -exp(A_log) * softplus(a + dt_bias), float32."""
    g_TV = -a_log_V.float().exp() * functional.softplus(a_TV.float() + dt_bias_V.float())
    return torch.sigmoid(b_TV).float(), g_TV


def delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_TVD: Tensor,
    beta_TV: Tensor,
    g_TV: Tensor,
    state_NVDD: Tensor,
    slots_S: Tensor,
    query_start_S1: Tensor,
    fresh_S: Tensor,
    advance_S: Tensor | None = None,
) -> Tensor:
    """Gated delta rule: token by token for short runs, in chunks of 64 for long ones."""
    share = v_TVD.shape[1] // q_TKD.shape[1]
    q_TVD = (_unit(q_TKD) * q_TKD.shape[2] ** -0.5).repeat_interleave(share, dim=1)
    k_TVD = _unit(k_TKD).repeat_interleave(share, dim=1)
    before_SVDD = state_NVDD[slots_S].float().masked_fill(fresh_S.view(-1, 1, 1, 1), 0)
    out_TVD = torch.empty_like(v_TVD)
    for rows, tokens in _runs(query_start_S1.tolist()):
        q, k, v, beta, g = (
            x[tokens].unflatten(0, (rows.stop - rows.start, -1)) for x in (q_TVD, k_TVD, v_TVD.float(), beta_TV, g_TV)
        )
        out, after = gated_delta_rule(q, k, v, beta, g, before_SVDD[rows])
        out_TVD[tokens] = out.flatten(0, 1).to(v_TVD.dtype)
        _advance(state_NVDD, slots_S[rows], after, advance_S, rows)
    return out_TVD


def gated_rms_norm(x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * rms(x) * silu(gate) over the last axis, the gate in float32."""
    normed = weight_D * normalise(x, eps).to(x.dtype)
    return (normed * functional.silu(gate.float())).to(x.dtype)


def normalise(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _advance(state: Tensor, slots_S: Tensor, after: Tensor, advance_S: Tensor | None, rows: slice) -> None:
    """Write the slots of the sequences `rows`, but for those that are to be left as they are."""
    after = after.to(state.dtype)
    if advance_S is None:
        state[slots_S] = after
    else:
        state[slots_S[advance_S[rows]]] = after[advance_S[rows]]


def _unit(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + L2_EPS)


def one_token_each(starts: list[int]) -> bool:
    """Whether every sequence of these query starts has one token."""
    return len(starts) > 1 and starts == list(range(len(starts)))


def _runs(starts: list[int]) -> list[tuple[slice, slice]]:
    """(sequences, tokens) to compute together: a step of single tokens as one batch, else each sequence alone."""
    if one_token_each(starts):
        return [(slice(0, starts[-1]), slice(0, starts[-1]))]
    return [(slice(s, s + 1), slice(a, b)) for s, (a, b) in enumerate(itertools.pairwise(starts)) if b > a]


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
