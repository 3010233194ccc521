"""Operators that read each number once, fused, in Triton: norms, rotary and stores of keys, activations.

T tokens, C columns, H query heads and G KV heads of D numbers, R of them turned, P block size.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

from shards.kernels.triton_segments import launch


@triton.jit
def _rms_norm(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    ADDS: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
) -> None:
    """One row: x (+ y, rounded and stored), normed as `weigh` does."""
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BC)
    stored = tl.load(x_ptr + row + c, mask=c < C, other=0.0)
    x = stored.to(tl.float32)
    if ADDS:
        x += tl.load(y_ptr + row + c, mask=c < C, other=0.0).to(tl.float32)
        x = x.to(stored.dtype).to(tl.float32)
        tl.store(sum_ptr + row + c, x, mask=c < C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)
    normed = weigh(x * tl.rsqrt(tl.sum(x * x, 0) / C + eps), weight, ZERO_CENTRED)
    tl.store(out_ptr + row + c, normed, mask=c < C)


@triton.jit
def weigh(normed: tl.tensor, weight: tl.tensor, ZERO_CENTRED: tl.constexpr) -> tl.tensor:
    """A zero-centred weight is applied in float32, the other after rounding to its dtype, as transformers does."""
    if ZERO_CENTRED:
        result = normed * (1.0 + weight.to(tl.float32))
    else:
        result = normed.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    return result


@triton.jit
def _normed_head(
    head_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    d: tl.tensor,
    inverse_rms: tl.tensor,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
) -> tl.tensor:
    """Numbers d of a head, normed and rounded, as float32."""
    x = tl.load(head_ptr + d, mask=d < D, other=0.0)
    result = x.to(tl.float32)
    if NORMED:
        weight = tl.load(norm_ptr + d, mask=d < D, other=0.0)
        result = weigh(result * inverse_rms, weight, ZERO_CENTRED).to(x.dtype).to(tl.float32)
    return result


@triton.jit
def _turn(
    head_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    NORMED: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
) -> None:
    """One head of one token: norm, then rotate-half rotary on its first R numbers."""
    d = tl.arange(0, BD)
    stored = tl.load(head_ptr + d, mask=d < D, other=0.0)
    x = stored.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    x = _normed_head(head_ptr, norm_ptr, d, inverse_rms, D, NORMED, ZERO_CENTRED)
    # The other half's number at the same place is read and normed again: registers are not shared over threads.
    other = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
    partner = _normed_head(head_ptr, norm_ptr, other, inverse_rms, D, NORMED, ZERO_CENTRED)
    partner = tl.where(d < R // 2, -partner, partner)
    cos = tl.load(cos_ptr + d, mask=d < R, other=1.0).to(stored.dtype).to(tl.float32)
    sin = tl.load(sin_ptr + d, mask=d < R, other=0.0).to(stored.dtype).to(tl.float32)
    tl.store(out_ptr + d, x * cos + partner * sin, mask=d < D)


@triton.jit
def _attention_inputs(
    qkv_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_pool_ptr: tl.tensor,
    v_pool_ptr: tl.tensor,
    eps: tl.tensor,
    H: tl.constexpr,
    HEAD: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
) -> None:
    """One head of one token: a query, which has HEAD columns of its row, a key or a value."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv_ptr + token * (H * HEAD + 2 * G * D)
    cos, sin = cos_ptr + token * R, sin_ptr + token * R
    if head < H:
        out = q_ptr + (token * H + head) * D
        _turn(row + head * HEAD, q_norm_ptr, cos, sin, out, eps, D, BD, R, Q_NORMED, ZERO_CENTRED)
    else:
        slot = tl.load(slots_ptr + token)
        source = row + H * HEAD + (head - H) * D
        place = ((slot // P * G + (head - H) % G) * P + slot % P) * D
        # A row that pads a captured step has no slot, nor one whose KV is there already.
        if slot >= 0:
            if head < H + G:
                _turn(source, k_norm_ptr, cos, sin, k_pool_ptr + place, eps, D, BD, R, K_NORMED, ZERO_CENTRED)
            else:
                d = tl.arange(0, BD)
                tl.store(v_pool_ptr + place + d, tl.load(source + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _silu_mul(x_ptr: tl.tensor, out_ptr: tl.tensor, C: tl.constexpr, BC: tl.constexpr) -> None:
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    gate = tl.load(x_ptr + row * 2 * C + c, mask=c < C, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * C + C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + c, gate * tl.sigmoid(gate) * up, mask=c < C)


@triton.jit
def _add_gated(
    x_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_stride: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    gate = tl.sigmoid(tl.load(gate_ptr + row * gate_stride).to(tl.float32))
    x = tl.load(x_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + c, x + shared * gate, mask=c < C)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
    """`Kernels.rms_norm`."""
    out, C = torch.empty_like(x), x.shape[-1]
    if x.numel():
        sizes = (C, triton.next_power_of_2(C), False, zero_centred)
        launch(_rms_norm, (x.numel() // C,), x, x, weight_D, out, out, eps, *sizes)
    return out


def add_rms_norm(
    x_TC: Tensor, y_TC: Tensor, weight_C: Tensor, eps: float, *, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """`Kernels.add_rms_norm`."""
    sum_TC, out_TC, C = torch.empty_like(x_TC), torch.empty_like(x_TC), x_TC.shape[1]
    if x_TC.numel():
        sizes = (C, triton.next_power_of_2(C), True, zero_centred)
        launch(_rms_norm, (x_TC.shape[0],), x_TC, y_TC, weight_C, sum_TC, out_TC, eps, *sizes)
    return sum_TC, out_TC


def attention_inputs(
    qkv_TN: Tensor,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cos_TR: Tensor,
    sin_TR: Tensor,
    k_pool_NGPD: Tensor,
    v_pool_NGPD: Tensor,
    slots_T: Tensor,
    *,
    gated: bool,
    zero_centred: bool,
) -> Tensor:
    """`Kernels.attention_inputs`."""
    (T, width), (_, G, P, D), R = qkv_TN.shape, k_pool_NGPD.shape, cos_TR.shape[1]
    head = 2 * D if gated else D
    H = (width - 2 * G * D) // head
    q_THD = qkv_TN.new_empty(T, H, D)
    if T:
        # A weight that is not there is not read.
        norms = (qkv_TN if q_norm_D is None else q_norm_D, qkv_TN if k_norm_D is None else k_norm_D)
        flags = (q_norm_D is not None, k_norm_D is not None, zero_centred)
        tensors = (qkv_TN, *norms, cos_TR, sin_TR, slots_T, q_THD, k_pool_NGPD, v_pool_NGPD)
        sizes = (H, head, G, P, D, triton.next_power_of_2(D), R)
        launch(_attention_inputs, (T, H + 2 * G), *tensors, eps, *sizes, *flags)
    return q_THD


def silu_mul(gate_up_TI2: Tensor) -> Tensor:
    """`Kernels.silu_mul`."""
    T, C = gate_up_TI2.shape[0], gate_up_TI2.shape[1] // 2
    out_TI = gate_up_TI2.new_empty(T, C)
    if T:
        BC = min(1024, triton.next_power_of_2(C))
        launch(_silu_mul, (T, triton.cdiv(C, BC)), gate_up_TI2, out_TI, C, BC)
    return out_TI


def add_gated(x_TC: Tensor, shared_TC: Tensor, gate_T1: Tensor) -> Tensor:
    """`Kernels.add_gated`."""
    (T, C), out_TC = x_TC.shape, torch.empty_like(x_TC)
    if T:
        BC = min(1024, triton.next_power_of_2(C))
        launch(_add_gated, (T, triton.cdiv(C, BC)), x_TC, shared_TC, gate_T1, out_TC, gate_T1.stride(0), C, BC)
    return out_TC
