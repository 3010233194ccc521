"""The operators a model is built of. Two sets implement them: `torch_kernels` and `native`.

T tokens of the step, S sequences of the step, H heads, D head dim, E experts held here, K experts per token,
I expert width, B blocks a sequence, P block size. In the native set a result row has the same bits whatever else is
in the batch, however a prompt is cut into chunks, and over how many ranks (1, 2, 4, .. up to `groups`) it is spread.
"""

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    """Operators of one device and mode. All tensors are contiguous unless said; results are new unless said."""

    @property
    def name(self) -> str:
        """ "torch" or "native"."""
        ...

    @property
    def deterministic(self) -> bool:
        """True when results do not depend on batch, chunking or layout."""
        ...

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N].

        Args:
            groups: cut C into this many equal parts, sum each part on its own, then sum the parts as a balanced
                binary tree (p0+p1)+(p2+p3): what a row-parallel layer needs to give the same bits at every tp. A
                power of two that divides C.
            wide: give float32 whatever x's dtype (partial sums that are still to be reduced over ranks; logits).
        """
        ...

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """RMS norm over the last axis, in float32: weight * x, or x * (1 + weight) where zero-centred."""
        ...

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """weight * rms(x) * silu(gate), over the last axis (Qwen3-Next's delta output norm, one-centred weight)."""
        ...

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis -> [T, I]."""
        ...

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate); gate is of x's shape, or has last axis 1."""
        ...

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate-half rotary on the first R of D; cos and sin float32 [T, R] (both halves repeated)."""
        ...

    def store_kv(self, k_THD: Tensor, v_THD: Tensor, k_pool_NHPD: Tensor, v_pool_NHPD: Tensor, slots_T: Tensor) -> None:
        """Write each token's k and v into slot block * P + offset (int64) of the pools, in place."""
        ...

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
        """Causal paged attention, queries of H heads over pools of Hkv heads (H a multiple of Hkv) -> [T, H, D].

        Sequence s has queries query_start_S1[s] .. query_start_S1[s+1]-1, the last tokens of its context of
        context_lens_S[s] tokens, whose k and v already lie in the blocks tables_SB[s] (int32).
        """
        ...

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax in float32 over all experts, best top_k first -> weights float32 [T, K], ids int64 [T, K]."""
        ...

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
        """Each token through each of its experts, unweighted -> [T, K, C]. ids (int64) < 0: not held here, gives zeros.

        `groups` and `wide` act on the down projection as in `linear`.
        """
        ...

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
        """combine(experts(x, ids, gate_up, down), weights, x) -> [T, C] in one call, with the same bits.

        For results that no other rank adds to: `experts` writes [T, K, C] to memory, this does not. weights float32.
        `wide`: sum results that were not rounded to x's dtype.
        """
        ...

    def combine(self, y_TKC: Tensor, weights_TK: Tensor, dtype_like: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y -> [T, C] in dtype_like's dtype; products and sums in float32."""
        ...

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
        """Depthwise causal convolution of width W over each sequence, then SiLU -> [T, C].

        state_NCW [slots, C, W-1] holds each sequence's last W-1 inputs and is advanced in place; a sequence whose
        fresh_S (bool) is true starts from zeros, and one whose advance_S (bool, None: all true) is false leaves its
        slot as it is. slots_S and query_start_S1 are int64.
        """
        ...

    def delta_gates(self, b_TV: Tensor, a_TV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor) -> tuple[Tensor, Tensor]:
        """beta = sigmoid(b), g = -exp(A_log) * softplus(a + dt_bias), both float32 [T, V]."""
        ...

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
        """Gated delta rule over each sequence -> [T, V, Dv]; q and k are L2-normalised (eps 1e-6), q scaled by Dk^-0.5.

        S = S * exp(g); S += k (v - S^T k) * beta; o = S^T q. state_NVDD [slots, V, Dk, Dv] float32 is advanced in
        place, but for sequences whose advance_S is false. K key heads serve V / K consecutive value heads each.
        """
        ...
