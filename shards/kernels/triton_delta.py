"""The gated delta net token by token, in Triton: for decode and for short runs of tokens.

S sequences, K key heads of dim Dk, V value heads of dim Dv, Q = 2 K Dk + V Dv channels, W width of the convolution,
N = Q + V Dv + 2 V columns of a projected row.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from shards.kernels.interface import DeltaWeights
from shards.kernels.torch_delta import L2_EPS
from shards.kernels.triton_segments import launch


@triton.jit
def _conv(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    state_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    fresh_ptr: tl.tensor,
    advance_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    Q: tl.constexpr,
    W: tl.constexpr,
    BQ: tl.constexpr,
    ADVANCES: tl.constexpr,
) -> None:
    """Depthwise causal convolution and SiLU of some channels of one sequence; then the channels' state advances."""
    s = tl.program_id(0)
    channel = tl.program_id(1) * BQ + tl.arange(0, BQ)
    real = channel < Q
    begin, end = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1)
    state = state_ptr + (tl.load(slots_ptr + s) * Q + channel) * (W - 1)
    # A flag a channel: the interpreter's masks are not joined with one number.
    kept = real & (tl.load(fresh_ptr + s + channel * 0) == 0)
    for t in range(begin, end):
        total = tl.zeros((BQ,), tl.float32)
        for w in tl.static_range(W):
            source = tl.zeros((BQ,), tl.int64) + (t - (W - 1) + w)
            x = tl.load(x_ptr + source * N + channel, mask=real & (source >= begin), other=0.0).to(tl.float32)
            x += tl.load(state + (source - begin + W - 1), mask=kept & (source < begin), other=0.0).to(tl.float32)
            total += x * tl.load(weight_ptr + channel * W + w, mask=real, other=0.0).to(tl.float32)
        y = total * tl.sigmoid(total)
        tl.store(out_ptr + t * Q + channel, y, mask=real)
    advances = end > begin
    if ADVANCES:
        advances = advances & (tl.load(advance_ptr + s) != 0)
    if advances:
        # Ascending: what is read lies behind what was written.
        for w in tl.static_range(W - 1):
            source = tl.zeros((BQ,), tl.int64) + (end - (W - 1) + w)
            x = tl.load(x_ptr + source * N + channel, mask=real & (source >= begin), other=0.0)
            old = tl.load(state + (source - begin + W - 1), mask=kept & (source < begin), other=0.0)
            tl.store(state + w, tl.where(source >= begin, x, old), mask=real)


@triton.jit
def _recur(
    qkv_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    a_log_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    state_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    fresh_ptr: tl.tensor,
    advance_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    EPS: tl.constexpr,
    ADVANCES: tl.constexpr,
) -> None:
    """Some value columns of one sequence and value head; the state stays in registers from token to token, rounded
    to what it is stored in behind each."""
    s, head = tl.program_id(0), tl.program_id(1)
    Q: tl.constexpr = 2 * K * DK + V * DV
    dk, dv = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    begin, end = tl.load(starts_ptr + s), tl.load(starts_ptr + s + 1)
    places = state_ptr + ((tl.load(slots_ptr + s) * V + head) * DK + dk[:, None]) * DV + dv[None, :]
    inside = (dk < DK)[:, None] & (dv < DV)[None, :]
    held = tl.load(places, mask=inside & (tl.load(fresh_ptr + s + dk * 0) == 0)[:, None], other=0.0)
    state = held.to(tl.float32)
    decay = -tl.exp(tl.load(a_log_ptr + head).to(tl.float32))
    dt_bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    for t in range(begin, end):
        row = qkv_ptr + t * Q
        q = tl.load(row + (head // (V // K)) * DK + dk, mask=dk < DK, other=0.0).to(tl.float32)
        k = tl.load(row + (K + head // (V // K)) * DK + dk, mask=dk < DK, other=0.0).to(tl.float32)
        v = tl.load(row + 2 * K * DK + head * DV + dv, mask=dv < DV, other=0.0).to(tl.float32)
        q = q * tl.rsqrt(tl.sum(q * q, 0) + EPS) * (DK**-0.5)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + EPS)
        gates = projected_ptr + t * N + Q + V * DV + head
        beta, a = tl.sigmoid(tl.load(gates).to(tl.float32)), tl.load(gates + V).to(tl.float32) + dt_bias
        # softplus; exp overflows where it equals its argument.
        softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
        state = state * tl.exp(decay * softplus)
        error = (v - tl.sum(state * k[:, None], 0)) * beta
        state = (state + k[:, None] * error[None, :]).to(held.dtype).to(tl.float32)
        out = tl.sum(state * q[:, None], 0)
        tl.store(out_ptr + (t * V + head) * DV + dv, out, mask=dv < DV)
    advances = end > begin
    if ADVANCES:
        advances = advances & (tl.load(advance_ptr + s) != 0)
    if advances:
        tl.store(places, state, mask=inside)


@triton.jit
def _gated_norm(
    x_ptr: tl.tensor,
    projected_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    Z: tl.constexpr,
    V: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
) -> None:
    """weight * rms(x) * silu(z) of one token and value head; z lies Z columns into its projected row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BV)
    x = tl.load(x_ptr + row * DV + d, mask=d < DV, other=0.0)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / DV + eps)).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < DV, other=0.0).to(tl.float32)
    z = tl.load(projected_ptr + (row // V) * N + Z + (row % V) * DV + d, mask=d < DV, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * DV + d, weight * normed * z * tl.sigmoid(z), mask=d < DV)


def delta_net(
    projected_TN: Tensor,
    weights: DeltaWeights,
    conv_state_MQW: Tensor,
    state_MVDD: Tensor,
    slots_S: Tensor,
    query_start_S1: Tensor,
    fresh_S: Tensor,
    advance_S: Tensor | None,
) -> Tensor:
    """`Kernels.delta_net`, token by token whatever the sequences' lengths; nothing of it waits for the device."""
    (T, N), S, (_, V, Dk, Dv), K = projected_TN.shape, slots_S.shape[0], state_MVDD.shape, weights.num_key_heads
    (Q, W), like = weights.conv1d_QW.shape, projected_TN
    out_TN = like.new_empty(T, V * Dv)
    if not T:
        return out_TN
    qkv_TQ, rules_TN = like.new_empty(T, Q), like.new_empty(T, V * Dv)
    fresh = fresh_S.view(torch.uint8)
    advance, advances = (fresh, False) if advance_S is None else (advance_S.view(torch.uint8), True)
    where = (slots_S, query_start_S1, fresh, advance)
    BQ = min(256, triton.next_power_of_2(Q))
    launch(
        _conv,
        (S, triton.cdiv(Q, BQ)),
        projected_TN,
        weights.conv1d_QW,
        conv_state_MQW,
        *where,
        qkv_TQ,
        N,
        Q,
        W,
        BQ,
        advances,
    )
    # A head's state of 128 x 128 float32 is cut into four programs of 16 KB each.
    BK, BV = triton.next_power_of_2(Dk), min(32, triton.next_power_of_2(Dv))
    inputs = (qkv_TQ, projected_TN, weights.a_log_V, weights.dt_bias_V, state_MVDD)
    sizes = (N, K, V, Dk, Dv, BK, BV, L2_EPS, advances)
    launch(_recur, (S, V, triton.cdiv(Dv, BV)), *inputs, *where, rules_TN, *sizes)
    BV = triton.next_power_of_2(Dv)
    launch(_gated_norm, (T * V,), rules_TN, projected_TN, weights.norm_D, out_TN, weights.eps, N, Q, V, Dv, BV)
    return out_TN
