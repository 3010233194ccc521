"""The operators in C++ (shards/kernels/native), for CPU: a row's bits depend on that row alone.

Thin calls into the compiled library: check, allocate, pass addresses. The library's loops choose among instruction
sets ("paths"); two paths need not agree in the last bit, so all ranks of a replica should run on one kind of machine.
"""

import ctypes
from typing import Literal

import torch
from torch import Tensor

from shards.kernels.check import check_tensor, check_tensors, dtype_code
from shards.kernels.library import declare
from shards.kernels.native_matmul import MATMUL_SIGNATURES, NativeMatmul

PATHS = ("plain", "avx2", "avx512", "avx512bf16", "amx")
MAX_CONV_WIDTH = 16

_int, _long, _float, _address = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = MATMUL_SIGNATURES | {
    "kernels_has_path": [_int],
    "kernels_best_path": [],
    "kernels_attention": [_int] * 3 + [_address] * 7 + [_long] * 6 + [_float],
    "kernels_store_kv": [_int] + [_address] * 5 + [_long] * 4,
    "kernels_causal_conv": [_int] * 2 + [_address] * 8 + [_long] * 2 + [_int],
    "kernels_delta_rule": [_int] * 3 + [_address] * 11 + [_long] * 5,
    "kernels_delta_gates": [_int] + [_address] * 6 + [_long] * 2,
    "kernels_norm": [_int] * 2 + [_address] * 4 + [_long] * 2 + [_float, _int],
    "kernels_silu_mul": [_int] * 2 + [_address] * 2 + [_long] * 2,
    "kernels_sigmoid_mul": [_int] * 2 + [_address] * 3 + [_long] * 3,
    "kernels_rotary": [_int] * 2 + [_address] * 4 + [_long] * 4,
    "kernels_route": [_int] * 2 + [_address] * 3 + [_long] * 3 + [_int],
    "kernels_combine": [_int] * 3 + [_address] * 3 + [_long] * 3,
}

_PLAIN_NORM, _ZERO_CENTRED_NORM, _GATED_NORM = 0, 1, 2


class NativeKernels:
    """Kernels of the compiled library; see shards.kernels.interface for each operator's contract.

    Args:
        library: what `load_library` returned.
        path: the instruction set; "auto" is the best this machine runs.

    Raises:
        ValueError: this machine cannot run that path; or, from every operator, a tensor of a dtype, shape or layout
            that the library does not take.
    """

    name = "native"
    deterministic = True

    def __init__(
        self, library: ctypes.CDLL, path: Literal["auto", "plain", "avx2", "avx512", "avx512bf16", "amx"] = "auto"
    ) -> None:
        declare(library, _SIGNATURES)
        self._library = library
        if path != "auto" and path not in PATHS:
            raise ValueError(f"path={path!r} is not one of auto, {', '.join(PATHS)}")
        self._path = library.kernels_best_path() if path == "auto" else PATHS.index(path)
        if not library.kernels_has_path(self._path):
            raise ValueError(f"path={path} cannot run on this processor; use path=auto")
        self._matmul = NativeMatmul(library=library, path=self._path)

    @property
    def path(self) -> str:
        """The instruction set that runs."""
        return PATHS[self._path]

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N]."""
        return self._matmul.linear(x_TC, weight_NC, bias_N, groups=groups, wide=wide)

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """RMS norm over the last axis."""
        return self._norm(x, None, weight_D, eps, _ZERO_CENTRED_NORM if zero_centred else _PLAIN_NORM)

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """weight * rms(x) * silu(gate) over the last axis."""
        return self._norm(x, gate, weight_D, eps, _GATED_NORM)

    def _norm(self, x: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, kind: int) -> Tensor:
        D = x.shape[-1]
        gate = x if gate is None else gate
        code = check_tensors(x, x=(x, x.shape), gate=(gate, x.shape), weight=(weight_D, (D,)))
        out = torch.empty_like(x)
        self._library.kernels_norm(
            torch.get_num_threads(), code, x.data_ptr(), gate.data_ptr(), weight_D.data_ptr(), out.data_ptr(),
            x.numel() // D, D, eps, kind,
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        T, twice = gate_up_TI2.shape
        code = check_tensors(gate_up_TI2, gate_up=(gate_up_TI2, (T, twice)))
        out_TI = gate_up_TI2.new_empty((T, twice // 2))
        self._library.kernels_silu_mul(
            torch.get_num_threads(), code, gate_up_TI2.data_ptr(), out_TI.data_ptr(), T, twice // 2
        )
        return out_TI

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate) in x's dtype."""
        gate = gate.to(x.dtype)
        width = gate.shape[-1]
        code = check_tensors(x, x=(x, x.shape), gate=(gate, (*x.shape[:-1], 1 if width == 1 else x.shape[-1])))
        out = torch.empty_like(x)
        self._library.kernels_sigmoid_mul(
            torch.get_num_threads(), code, x.data_ptr(), gate.data_ptr(), out.data_ptr(),
            x.numel() // x.shape[-1], x.shape[-1], width,
        )  # fmt: skip
        return out

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate-half rotary on the first R of D, in x's dtype."""
        (T, H, D), R = x_THD.shape, cos_TR.shape[1]
        code = check_tensors(x_THD, x=(x_THD, (T, H, D)))
        check_tensor("cos", cos_TR, torch.float32, (T, R))
        check_tensor("sin", sin_TR, torch.float32, (T, R))
        if R > D or R % 2:
            raise ValueError(f"rotary: R={R} must be even and at most D={D}")
        out_THD = torch.empty_like(x_THD)
        self._library.kernels_rotary(
            torch.get_num_threads(), code, x_THD.data_ptr(), cos_TR.data_ptr(), sin_TR.data_ptr(), out_THD.data_ptr(),
            T, H, D, R,
        )  # fmt: skip
        return out_THD

    def store_kv(self, k_THD: Tensor, v_THD: Tensor, k_pool_NHPD: Tensor, v_pool_NHPD: Tensor, slots_T: Tensor) -> None:
        """Write each token's k and v into its slot of the pools."""
        (T, H, D), (N, _, P, _) = k_THD.shape, k_pool_NHPD.shape
        code = check_tensors(
            k_THD,
            k=(k_THD, (T, H, D)),
            v=(v_THD, (T, H, D)),
            k_pool=(k_pool_NHPD, (N, H, P, D)),
            v_pool=(v_pool_NHPD, (N, H, P, D)),
        )
        check_tensor("slots", slots_T, torch.int64, (T,))
        self._library.kernels_store_kv(
            code, k_THD.data_ptr(), v_THD.data_ptr(), k_pool_NHPD.data_ptr(), v_pool_NHPD.data_ptr(),
            slots_T.data_ptr(), T, H, P, D,
        )  # fmt: skip

    def attention(
        self,
        q_THD: Tensor,
        k_pool_NHPD: Tensor,
        v_pool_NHPD: Tensor,
        tables_SB: Tensor,
        query_start_S1: Tensor,
        context_lens_S: Tensor,
        scale: float,
    ) -> Tensor:
        """Causal paged attention: online softmax over 64 key positions at a time, counted from position 0."""
        (T, H, D), (N, Hkv, P, _), (S, B) = q_THD.shape, k_pool_NHPD.shape, tables_SB.shape
        pool = (N, Hkv, P, D)
        code = check_tensors(q_THD, q=(q_THD, (T, H, D)), k_pool=(k_pool_NHPD, pool), v_pool=(v_pool_NHPD, pool))
        check_tensor("tables", tables_SB, torch.int32, (S, B))
        query_start, contexts = _as_int64(query_start_S1, S + 1), _as_int64(context_lens_S, S)
        if H % Hkv:
            raise ValueError(f"attention: {H} query heads are no multiple of {Hkv} kv heads")
        out_THD = torch.empty_like(q_THD)
        self._library.kernels_attention(
            self._path, torch.get_num_threads(), code, q_THD.data_ptr(), k_pool_NHPD.data_ptr(), v_pool_NHPD.data_ptr(),
            tables_SB.data_ptr(), query_start.data_ptr(), contexts.data_ptr(), out_THD.data_ptr(), S, H, Hkv, D, P, B,
            scale,
        )  # fmt: skip
        return out_THD

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax over all experts and the best top_k; of equals, the lower id first."""
        T, E = logits_TE.shape
        code = check_tensors(logits_TE, logits=(logits_TE, (T, E)))
        if not 1 <= top_k <= E:
            raise ValueError(f"route: top_k={top_k} must lie in 1..{E}, the number of experts")
        weights_TK = logits_TE.new_empty((T, top_k), dtype=torch.float32)
        ids_TK = logits_TE.new_empty((T, top_k), dtype=torch.int64)
        self._library.kernels_route(
            torch.get_num_threads(), code, logits_TE.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(),
            T, E, top_k, renormalize,
        )  # fmt: skip
        return weights_TK, ids_TK

    def experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        gate_up_E2IC: Tensor,
        down_ECI: Tensor,
        *,
        groups: int = 1,
        wide: bool = False,
    ) -> Tensor:
        """Each token through each of its experts; the weights of an expert that was hit are read once."""
        return self._matmul.experts(x_TC, ids_TK, gate_up_E2IC, down_ECI, groups=groups, wide=wide)

    def weighted_experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        gate_up_E2IC: Tensor,
        down_ECI: Tensor,
        *,
        groups: int = 1,
        wide: bool = False,
    ) -> Tensor:
        """The bits of `combine` of `experts`, without their results in memory all at once."""
        return self._matmul.weighted_experts(x_TC, ids_TK, weights_TK, gate_up_E2IC, down_ECI, groups=groups, wide=wide)

    def combine(self, y_TKC: Tensor, weights_TK: Tensor, dtype_like: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y, in float32."""
        T, K, C = y_TKC.shape
        code = check_tensors(y_TKC, y=(y_TKC, (T, K, C)))
        check_tensor("weights", weights_TK, torch.float32, (T, K))
        out_TC = y_TKC.new_empty((T, C), dtype=dtype_like.dtype)
        self._library.kernels_combine(
            torch.get_num_threads(), code, dtype_code("dtype_like", out_TC), y_TKC.data_ptr(), weights_TK.data_ptr(),
            out_TC.data_ptr(), T, K, C,
        )  # fmt: skip
        return out_TC

    def causal_conv(
        self,
        x_TC: Tensor,
        weight_CW: Tensor,
        state_NCW: Tensor,
        slots_S: Tensor,
        query_start_S1: Tensor,
        fresh_S: Tensor,
        advance_S: Tensor | None = None,
    ) -> Tensor:
        """Depthwise causal convolution and SiLU; the state's rows are advanced in place."""
        (T, C), W, S, N = x_TC.shape, weight_CW.shape[1], slots_S.shape[0], state_NCW.shape[0]
        if not 1 <= W <= MAX_CONV_WIDTH:
            raise ValueError(f"causal_conv: width {W} must lie in 1..{MAX_CONV_WIDTH}; use kernels=torch for others")
        weight, state = (weight_CW, (C, W)), (state_NCW, (N, C, W - 1))
        code = check_tensors(x_TC, x=(x_TC, (T, C)), weight=weight, state=state)
        advance = _check_sequences(slots_S, query_start_S1, fresh_S, advance_S, S)
        out_TC = torch.empty_like(x_TC)
        self._library.kernels_causal_conv(
            torch.get_num_threads(), code, x_TC.data_ptr(), weight_CW.data_ptr(), state_NCW.data_ptr(),
            slots_S.data_ptr(), query_start_S1.data_ptr(), fresh_S.data_ptr(), advance, out_TC.data_ptr(), S, C, W,
        )  # fmt: skip
        return out_TC

    def delta_gates(self, b_TV: Tensor, a_TV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor) -> tuple[Tensor, Tensor]:
        """beta = sigmoid(b) and g = -exp(A_log) * softplus(a + dt_bias), float32."""
        T, V = b_TV.shape
        code = check_tensors(b_TV, b=(b_TV, (T, V)), a=(a_TV, (T, V)))
        a_log_V, dt_bias_V = a_log_V.float(), dt_bias_V.float()
        check_tensor("a_log", a_log_V, torch.float32, (V,))
        check_tensor("dt_bias", dt_bias_V, torch.float32, (V,))
        beta_TV, g_TV = b_TV.new_empty((T, V), dtype=torch.float32), b_TV.new_empty((T, V), dtype=torch.float32)
        self._library.kernels_delta_gates(
            code, b_TV.data_ptr(), a_TV.data_ptr(), a_log_V.data_ptr(), dt_bias_V.data_ptr(), beta_TV.data_ptr(),
            g_TV.data_ptr(), T, V,
        )  # fmt: skip
        return beta_TV, g_TV

    def delta_rule(
        self,
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
        """Gated delta rule, token by token whatever the length: a chunk's end leaves no mark."""
        (T, K, Dk), (_, V, Dv), S, N = q_TKD.shape, v_TVD.shape, slots_S.shape[0], state_NVDD.shape[0]
        keys = (T, K, Dk)
        code = check_tensors(v_TVD, q=(q_TKD, keys), k=(k_TKD, keys), v=(v_TVD, (T, V, Dv)))
        check_tensor("beta", beta_TV, torch.float32, (T, V))
        check_tensor("g", g_TV, torch.float32, (T, V))
        check_tensor("state", state_NVDD, torch.float32, (N, V, Dk, Dv))
        advance = _check_sequences(slots_S, query_start_S1, fresh_S, advance_S, S)
        if V % K:
            raise ValueError(f"delta_rule: {V} value heads are no multiple of {K} key heads")
        out_TVD = torch.empty_like(v_TVD)
        self._library.kernels_delta_rule(
            self._path, torch.get_num_threads(), code, q_TKD.data_ptr(), k_TKD.data_ptr(), v_TVD.data_ptr(),
            beta_TV.data_ptr(), g_TV.data_ptr(), state_NVDD.data_ptr(), slots_S.data_ptr(), query_start_S1.data_ptr(),
            fresh_S.data_ptr(), advance, out_TVD.data_ptr(), S, K, V, Dk, Dv,
        )  # fmt: skip
        return out_TVD


def _check_sequences(
    slots_S: Tensor, query_start_S1: Tensor, fresh_S: Tensor, advance_S: Tensor | None, count: int
) -> int:
    """The address of advance_S, 0 for None."""
    check_tensor("slots", slots_S, torch.int64, (count,))
    check_tensor("query_start", query_start_S1, torch.int64, (count + 1,))
    check_tensor("fresh", fresh_S, torch.bool, (count,))
    if advance_S is None:
        return 0
    check_tensor("advance", advance_S, torch.bool, (count,))
    return advance_S.data_ptr()


def _as_int64(values: Tensor, length: int) -> Tensor:
    """The attention contract leaves the integer dtype of starts and lengths open."""
    values = values.to(torch.int64)
    check_tensor("query_start or context_lens", values, torch.int64, (length,))
    return values
