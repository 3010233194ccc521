"""The operators in C++ (shards/kernels/native), for CPU: a row's bits depend on that row alone.

Thin calls into the compiled library: check, allocate, pass addresses. The library's loops choose among instruction
sets ("paths"); two paths need not agree in the last bit, so all ranks of a replica should run on one kind of machine.
"""

import ctypes
from typing import Literal

import torch
from torch import Tensor

from shards.int_weights import ExpertWeights
from shards.kernels.check import check_tensor, check_tensors, dtype_code
from shards.kernels.interface import DeltaWeights
from shards.kernels.library import declare
from shards.kernels.native_matmul import MATMUL_SIGNATURES, NativeMatmul
from shards.kernels.native_steps import STEP_SIGNATURES, NativeSteps

PathName = Literal["plain", "avx2", "avx512", "avx512bf16", "amx"]
PATHS: tuple[PathName, ...] = ("plain", "avx2", "avx512", "avx512bf16", "amx")

_int, _long, _float, _address = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = (
    MATMUL_SIGNATURES
    | STEP_SIGNATURES
    | {
        "kernels_has_path": [_int],
        "kernels_best_path": [],
        "kernels_attention": [_int] * 3 + [_address] * 8 + [_long] * 8 + [_float],
        "kernels_attention_inputs": [_int] * 3 + [_address] * 9 + [_long] * 7 + [_float, _int],
        "kernels_delta_net": [_int] * 4 + [_address] * 12 + [_long] * 5 + [_int, _float],
        "kernels_add_norm": [_int] * 3 + [_address] * 5 + [_long] * 2 + [_float, _int],
        "kernels_silu_mul": [_int] * 3 + [_address] * 2 + [_long] * 3,
        "kernels_route": [_int] * 3 + [_address] * 3 + [_long] * 4 + [_int],
        "kernels_combine": [_int] * 3 + [_address] * 3 + [_long] * 3,
        "kernels_best_tokens": [_int] * 2 + [_address] * 2 + [_long] * 3,
        "kernels_add_gated": [_int] * 3 + [_address] * 4 + [_long] * 3,
    }
)


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
        self._steps = NativeSteps(library=library, path=self._path)

    @property
    def library(self) -> ctypes.CDLL:
        """The compiled library, or what stands for it."""
        return self._library

    def through(self, library: ctypes.CDLL) -> "NativeKernels":
        """The same operators, called through something that stands for the library."""
        return NativeKernels(library, self.path)

    @property
    def path(self) -> PathName:
        """The instruction set that runs."""
        return PATHS[self._path]

    def lay_out(self, weight_NC: Tensor, *, groups: int = 1) -> Tensor:
        """In strips of 16 rows, but for AMX tiles."""
        self._matmul.lay_out(weight_NC, groups=groups)
        return weight_NC

    def lay_out_experts(self, gate_up_E2IC: Tensor, down_ECI: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Gates and ups each on their own, so that a gate's strip has an up's beside it."""
        E, width, C = gate_up_E2IC.shape
        self._matmul.lay_out(gate_up_E2IC.view(E, 2, width // 2, C), groups=1)
        self._matmul.lay_out(down_ECI, groups=groups)
        return gate_up_E2IC, down_ECI

    def take_rows(self, weight_NC: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of a weight that was laid out."""
        return self._matmul.take_rows(weight_NC, ids_T)

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N]."""
        return self._matmul.linear(x_TC, weight_NC, bias_N, groups=groups, wide=wide)

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """RMS norm over the last axis."""
        D = x.shape[-1]
        code = check_tensors(x, x=(x, x.shape), weight=(weight_D, (D,)))
        out = torch.empty_like(x)
        self._library.kernels_add_norm(
            self._path, torch.get_num_threads(), code, x.data_ptr(), 0, weight_D.data_ptr(), 0, out.data_ptr(),
            x.numel() // D, D, eps, zero_centred,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x_TC: Tensor, y_TC: Tensor, weight_C: Tensor, eps: float, *, zero_centred: bool
    ) -> tuple[Tensor, Tensor]:
        """x + y, and its RMS norm."""
        T, C = x_TC.shape
        code = check_tensors(x_TC, x=(x_TC, (T, C)), y=(y_TC, (T, C)), weight=(weight_C, (C,)))
        sum_TC, out_TC = torch.empty_like(x_TC), torch.empty_like(x_TC)
        self._library.kernels_add_norm(
            self._path, torch.get_num_threads(), code, x_TC.data_ptr(), y_TC.data_ptr(), weight_C.data_ptr(),
            sum_TC.data_ptr(), out_TC.data_ptr(), T, C, eps, zero_centred,
        )  # fmt: skip
        return sum_TC, out_TC

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        T, twice = gate_up_TI2.shape
        code = check_tensors(gate_up_TI2, gate_up=(gate_up_TI2, (T, twice)))
        out_TI = gate_up_TI2.new_empty((T, twice // 2))
        self._library.kernels_silu_mul(
            self._path, torch.get_num_threads(), code, gate_up_TI2.data_ptr(), out_TI.data_ptr(), T, twice // 2, twice
        )
        return out_TI

    def attention_inputs(
        self,
        qkv_TN: Tensor,
        q_norm_D: Tensor | None,
        k_norm_D: Tensor | None,
        eps: float,
        cos_TR: Tensor,
        sin_TR: Tensor,
        k_pool_NHPD: Tensor,
        v_pool_NHPD: Tensor,
        slots_T: Tensor,
        *,
        gated: bool,
        zero_centred: bool,
    ) -> Tensor:
        """Queries for `attention`; keys and values go into the pools."""
        (T, width), (_, Hkv, P, D), R = qkv_TN.shape, k_pool_NHPD.shape, cos_TR.shape[1]
        head = D * (2 if gated else 1)
        H = (width - 2 * Hkv * D) // head
        code = check_tensors(
            qkv_TN,
            qkv=(qkv_TN, (T, H * head + 2 * Hkv * D)),
            k_pool=(k_pool_NHPD, k_pool_NHPD.shape),
            v_pool=(v_pool_NHPD, k_pool_NHPD.shape),
        )
        for name, norm in (("q_norm", q_norm_D), ("k_norm", k_norm_D)):
            if norm is not None:
                check_tensor(name, norm, qkv_TN.dtype, (D,))
        check_tensor("cos", cos_TR, torch.float32, (T, R))
        check_tensor("sin", sin_TR, torch.float32, (T, R))
        check_tensor("slots", slots_T, torch.int64, (T,))
        if R > D or R % 2:
            raise ValueError(f"attention_inputs: R={R} must be even and at most D={D}")
        q_THD = qkv_TN.new_empty((T, H, D))
        self._library.kernels_attention_inputs(
            self._path, torch.get_num_threads(), code, qkv_TN.data_ptr(), _address_of(q_norm_D), _address_of(k_norm_D),
            cos_TR.data_ptr(), sin_TR.data_ptr(), k_pool_NHPD.data_ptr(), v_pool_NHPD.data_ptr(), slots_T.data_ptr(),
            q_THD.data_ptr(), T, H, Hkv, D, R, P, head, eps, zero_centred,
        )  # fmt: skip
        return q_THD

    def attention(
        self,
        q_THD: Tensor,
        k_pool_NHPD: Tensor,
        v_pool_NHPD: Tensor,
        tables_SB: Tensor,
        query_start_S1: Tensor,
        context_lens_S: Tensor,
        scale: float,
        gate_THD: Tensor | None = None,
    ) -> Tensor:
        """Causal paged attention: online softmax over 64 key positions at a time, counted from position 0."""
        (T, H, D), (N, Hkv, P, _), (S, B) = q_THD.shape, k_pool_NHPD.shape, tables_SB.shape
        pool = (N, Hkv, P, D)
        code = check_tensors(q_THD, q=(q_THD, (T, H, D)), k_pool=(k_pool_NHPD, pool), v_pool=(v_pool_NHPD, pool))
        check_tensor("tables", tables_SB, torch.int32, (S, B))
        query_start, contexts = _as_int64(query_start_S1, S + 1), _as_int64(context_lens_S, S)
        if H % Hkv:
            raise ValueError(f"attention: {H} query heads are no multiple of {Hkv} kv heads")
        if gate_THD is not None:
            _check_rows("gate", gate_THD, q_THD.dtype, (T, H, D))
        gate_rows, gate_heads = (0, 0) if gate_THD is None else gate_THD.stride()[:2]
        out_THD = torch.empty_like(q_THD)
        self._library.kernels_attention(
            self._path, torch.get_num_threads(), code, q_THD.data_ptr(), k_pool_NHPD.data_ptr(), v_pool_NHPD.data_ptr(),
            tables_SB.data_ptr(), query_start.data_ptr(), contexts.data_ptr(), _address_of(gate_THD),
            out_THD.data_ptr(), S, H, Hkv, D, P, B, gate_rows, gate_heads, scale,
        )  # fmt: skip
        return out_THD

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax over all experts and the best top_k; of equals, the lower id first."""
        T, E = logits_TE.shape
        code = dtype_code("logits", logits_TE)
        _check_rows("logits", logits_TE, logits_TE.dtype, (T, E))
        if not 1 <= top_k <= E:
            raise ValueError(f"route: top_k={top_k} must lie in 1..{E}, the number of experts")
        weights_TK = logits_TE.new_empty((T, top_k), dtype=torch.float32)
        ids_TK = logits_TE.new_empty((T, top_k), dtype=torch.int64)
        self._library.kernels_route(
            self._path, torch.get_num_threads(), code, logits_TE.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr(),
            T, E, top_k, logits_TE.stride(0), renormalize,
        )  # fmt: skip
        return weights_TK, ids_TK

    def experts(
        self,
        x_TC: Tensor,
        ids_TK: Tensor,
        gate_up_E2IC: ExpertWeights,
        down_ECI: ExpertWeights,
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
        gate_up_E2IC: ExpertWeights,
        down_ECI: ExpertWeights,
        *,
        groups: int = 1,
    ) -> Tensor:
        """The bits of `combine` of `experts`, without their results in memory all at once."""
        return self._matmul.weighted_experts(x_TC, ids_TK, weights_TK, gate_up_E2IC, down_ECI, groups=groups)

    def combine(self, y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y, in float32."""
        T, K, C = y_TKC.shape
        code = check_tensors(y_TKC, y=(y_TKC, (T, K, C)))
        check_tensor("weights", weights_TK, torch.float32, (T, K))
        out_TC = y_TKC.new_empty((T, C))
        self._library.kernels_combine(
            self._path, torch.get_num_threads(), code, y_TKC.data_ptr(), weights_TK.data_ptr(), out_TC.data_ptr(),
            T, K, C,
        )  # fmt: skip
        return out_TC

    def add_gated(self, x_TC: Tensor, shared_TC: Tensor, gate_T1: Tensor) -> Tensor:
        """x + shared * sigmoid(gate) in x's dtype."""
        T, C = x_TC.shape
        code = check_tensors(x_TC, x=(x_TC, (T, C)), shared=(shared_TC, (T, C)))
        _check_rows("gate", gate_T1, x_TC.dtype, (T, 1))
        out_TC = torch.empty_like(x_TC)
        self._library.kernels_add_gated(
            self._path, torch.get_num_threads(), code, x_TC.data_ptr(), shared_TC.data_ptr(), gate_T1.data_ptr(),
            out_TC.data_ptr(), T, C, gate_T1.stride(0),
        )  # fmt: skip
        return out_TC

    def best_tokens(self, logits_NV: Tensor, vocab_size: int) -> Tensor:
        """Each row's largest logit."""
        N, columns = logits_NV.shape
        _check_rows("logits", logits_NV, torch.float32, (N, columns))
        if not 1 <= vocab_size <= columns:
            raise ValueError(f"best_tokens: vocab_size={vocab_size} must lie in 1..{columns}, the logits' columns")
        tokens_N = logits_NV.new_empty(N, dtype=torch.int64)
        self._library.kernels_best_tokens(
            self._path, torch.get_num_threads(), logits_NV.data_ptr(), tokens_N.data_ptr(), N, vocab_size,
            logits_NV.stride(0),
        )  # fmt: skip
        return tokens_N

    def best_of_part(self, logits_NV: Tensor, size: int, first: int) -> Tensor:
        """Each row's largest logit and its place."""
        _check_rows("logits", logits_NV, torch.float32, tuple(logits_NV.shape))
        return self._steps.best_of_part(logits_NV, size, first)

    def best_of_pairs(self, pairs_PN2: Tensor) -> Tensor:
        """The best of several parts, of equals the first."""
        return self._steps.best_of_pairs(pairs_PN2)

    def embed(self, table_VC: Tensor, ids_T: Tensor, first: int = 0) -> Tensor:
        """Rows of a table; zeros for ids that are not in it."""
        return self._steps.embed(table_VC, ids_T, first)

    def beside(self, a_TC: Tensor, b_TC: Tensor) -> Tensor:
        """[a | b]."""
        return self._steps.beside(a_TC, b_TC)

    def local_ids(self, ids_TK: Tensor, first: int, held: int) -> Tensor:
        """ids counted from `first`, or -1."""
        return self._steps.local_ids(ids_TK, first, held)

    def delta_net(
        self,
        projected_TN: Tensor,
        weights: DeltaWeights,
        conv_state_MQW: Tensor,
        state_MVDD: Tensor,
        slots_S: Tensor,
        query_start_S1: Tensor,
        fresh_S: Tensor,
        advance_S: Tensor | None = None,
    ) -> Tensor:
        """The gated delta net between its projections, token by token whatever the length."""
        (M, V, Dk, Dv), (Q, W), S, K = state_MVDD.shape, weights.conv1d_QW.shape, len(slots_S), weights.num_key_heads
        code = check_tensors(
            projected_TN,
            projected=(projected_TN, (len(projected_TN), 2 * K * Dk + 2 * V * Dv + 2 * V)),
            conv1d=(weights.conv1d_QW, (2 * K * Dk + V * Dv, W)),
            norm=(weights.norm_D, (Dv,)),
            conv_state=(conv_state_MQW, (M, Q, W - 1)),
        )
        check_tensor("a_log", weights.a_log_V, torch.float32, (V,))
        check_tensor("dt_bias", weights.dt_bias_V, torch.float32, (V,))
        state_code = check_tensors(state_MVDD, state=(state_MVDD, (M, V, Dk, Dv)))
        _check_sequences(slots_S, query_start_S1, fresh_S, advance_S)
        if V % K:
            raise ValueError(f"delta_net: {V} value heads are no multiple of {K} key heads")
        out_TN = projected_TN.new_empty((len(projected_TN), V * Dv))
        self._library.kernels_delta_net(
            self._path, torch.get_num_threads(), code, state_code, projected_TN.data_ptr(),
            weights.conv1d_QW.data_ptr(), conv_state_MQW.data_ptr(), weights.a_log_V.data_ptr(),
            weights.dt_bias_V.data_ptr(), weights.norm_D.data_ptr(), state_MVDD.data_ptr(), slots_S.data_ptr(),
            query_start_S1.data_ptr(), fresh_S.data_ptr(), _address_of(advance_S), out_TN.data_ptr(), S, K, V, Dk,
            Dv, W, weights.eps,
        )  # fmt: skip
        return out_TN


def _check_sequences(slots_S: Tensor, query_start_S1: Tensor, fresh_S: Tensor, advance_S: Tensor | None) -> None:
    count = len(slots_S)
    check_tensor("slots", slots_S, torch.int64, (count,))
    check_tensor("query_start", query_start_S1, torch.int64, (count + 1,))
    check_tensor("fresh", fresh_S, torch.bool, (count,))
    if advance_S is not None:
        check_tensor("advance", advance_S, torch.bool, (count,))


def _check_rows(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse x unless it is a CPU tensor of that dtype and shape whose last axis lies in one piece."""
    if x.dtype != dtype or x.shape != shape or (shape[-1] > 1 and x.stride(-1) != 1) or not x.is_cpu:
        found = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
        raise ValueError(f"{name} is {found}; native kernels need {dtype} {list(shape)}, rows in one piece, on cpu")


def _address_of(x: Tensor | None) -> int:
    """0 for None."""
    return 0 if x is None else x.data_ptr()


def _as_int64(values: Tensor, length: int) -> Tensor:
    """The attention contract leaves the integer dtype of starts and lengths open."""
    values = values.to(torch.int64)
    check_tensor("query_start or context_lens", values, torch.int64, (length,))
    return values
