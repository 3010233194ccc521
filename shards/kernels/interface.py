"""The operators a model is built of. Three sets implement them: `torch_kernels`, `native`, `triton_kernels`.

T tokens of the step, S sequences of the step, H heads, D head dim, E experts held here, K experts per token,
I expert width, B blocks a sequence, P block size. In the native set a result row has the same bits whatever else is
in the batch, however a prompt is cut into chunks, and over how many ranks (1, 2, 4, .. up to `groups`) it is spread.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shards.int_weights import ExpertWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaWeights:
    """What a gated delta net holds between its two projections; Q = (2 K Dk + V Dv) channels."""

    conv1d_QW: Tensor
    a_log_V: Tensor
    """float32, as is dt_bias_V."""
    dt_bias_V: Tensor
    norm_D: Tensor
    num_key_heads: int
    key_dim: int
    eps: float


class Kernels(Protocol):
    """Operators of one device and mode. All tensors are contiguous unless said; results are new unless said."""

    @property
    def name(self) -> str:
        """ "torch", "native" or "triton"."""
        ...

    @property
    def deterministic(self) -> bool:
        """True when results do not depend on batch, chunking or layout."""
        ...

    def lay_out(self, weight_NC: Tensor, *, groups: int = 1) -> Tensor:
        """The weight as `linear` with as many groups reads it, in the same memory and shape; for once, when it loads.

        What lies where is the set's own affair: the weight is then good for `linear` and `take_rows` only.
        """
        ...

    def lay_out_experts(self, gate_up_E2IC: Tensor, down_ECI: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
        """`lay_out` for `experts` and `weighted_experts` with as many groups."""
        ...

    def take_rows(self, weight_NC: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of a weight laid out in one group, as they were before -> [T, C]: a head that is an embedding too.

        Zeros for ids below zero.
        """
        ...

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N].

        Args:
            weight_NC: as `lay_out` gives it, with the same groups.
            groups: cut C into this many equal parts, sum each part on its own, then sum the parts as a balanced
                binary tree (p0+p1)+(p2+p3): what a row-parallel layer needs to give the same bits at every tp. A
                power of two that divides C.
            wide: give float32 whatever x's dtype (partial sums that are still to be reduced over ranks; logits).
        """
        ...

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """RMS norm over the last axis, in float32: weight * x, or x * (1 + weight) where zero-centred."""
        ...

    def add_rms_norm(
        self, x_TC: Tensor, y_TC: Tensor, weight_C: Tensor, eps: float, *, zero_centred: bool
    ) -> tuple[Tensor, Tensor]:
        """x + y, and its RMS norm: both [T, C]."""
        ...

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis -> [T, I]."""
        ...

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
        """From the rows of one projection: queries for `attention`, keys and values into the pools.

        A row holds the heads of the queries (each [query | gate] where gated), of the keys, of the values; there may be
        no queries. Queries and keys go through an RMS norm over D where there is a weight (as in `rms_norm`), then
        through rotate-half rotary on the first R of D, in the row's dtype.

        Args:
            cos_TR: float32 as sin_TR, both halves repeated.
            slots_T: int64 block * P + offset, where each token's key and value go; nowhere where it is < 0.

        Returns:
            queries [T, H, D].
        """
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
        gate_THD: Tensor | None = None,
    ) -> Tensor:
        """Causal paged attention, queries of H heads over pools of Hkv heads (H a multiple of Hkv) -> [T, H, D].

        Sequence s has queries query_start_S1[s] .. query_start_S1[s+1]-1, the last tokens of its context of
        context_lens_S[s] tokens, whose k and v already lie in the blocks tables_SB[s] (int32).
        """
        ...

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax in float32 over all experts, best top_k first -> weights float32 [T, K], ids int64 [T, K].

        The rows of logits_TE may lie apart.
        """
        ...

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
        """Each token through each of its experts, unweighted -> [T, K, C]. ids (int64) < 0: not held here, gives zeros.

        Weights are as `lay_out_experts` gives them, or (not in the triton set) both are integers, whose groups of
        columns lie within the parts of the sum; `groups` and `wide` act on the down projection as in `linear`.
        """
        ...

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
        """combine(experts(x, ids, gate_up, down), weights) -> [T, C] in one call, with the same bits.

        For results that no other rank adds to: `experts` writes [T, K, C] to memory, this does not. weights float32.
        """
        ...

    def combine(self, y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y -> [T, C] in y's dtype; products and sums in float32."""
        ...

    def add_gated(self, x_TC: Tensor, shared_TC: Tensor, gate_T1: Tensor) -> Tensor:
        """x + shared * sigmoid(gate) in x's dtype: the shared expert joins the routed ones; gate rows may lie apart."""
        ...

    def best_tokens(self, logits_NV: Tensor, vocab_size: int) -> Tensor:
        """The largest of each row's first vocab_size float32 logits, of equals the first -> int64 [N].

        NO_TOKEN for a row of which one is NaN or infinite, or none above minus infinity.
        """
        ...

    def best_of_part(self, logits_NV: Tensor, size: int, first: int) -> Tensor:
        """Each row's largest of its first `size` float32 logits and its place, counted from `first` -> float64 [N, 2].

        For a vocabulary that is spread over ranks. The logit is NaN where one is NaN or the largest is infinite, and
        minus infinity where all are.
        """
        ...

    def best_of_pairs(self, pairs_PN2: Tensor) -> Tensor:
        """What `best_tokens` gives of the whole vocabulary, from `best_of_part` of P consecutive parts -> int64 [N]."""
        ...

    def embed(self, table_VC: Tensor, ids_T: Tensor, first: int = 0) -> Tensor:
        """Rows of a table whose first one is that of id `first` -> [T, C]; zeros for ids that are not in it."""
        ...

    def beside(self, a_TC: Tensor, b_TC: Tensor) -> Tensor:
        """[a | b], two matrices of the same shape -> [T, 2C]."""
        ...

    def local_ids(self, ids_TK: Tensor, first: int, held: int) -> Tensor:
        """int64 ids counted from `first`; -1 for those that are not among the `held` from there on."""
        ...

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
        """The gated delta net between its two projections -> [T, V * Dv].

        A row of projected_TN holds q and k of K key heads, v and z of V value heads (V / K consecutive ones belong to a
        key head), then b and a, one number a value head. With beta = sigmoid(b), g = -exp(A_log) * softplus(a +
        dt_bias), and [q | k | v] after a depthwise causal convolution and SiLU, q and k L2-normalised (eps 1e-6), q
        scaled by Dk^-0.5: S = S * exp(g); S += k (v - S^T k) * beta; o = S^T q; out = norm * rms(o) * silu(z).
        (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024; transformers' Qwen3NextGatedDeltaNet.)

        Args:
            conv_state_MQW: each slot's last W - 1 inputs of the convolution's Q channels [slots, Q, W - 1], advanced
                in place.
            state_MVDD: float32 or bfloat16 [slots, V, Dk, Dv], advanced in place; computed with in float32. native and
                triton round behind every token, so that a cut between two leaves no mark; torch when it stores.
            slots_S: int64; query_start_S1 too.
            fresh_S: bool; a sequence for which it is true starts from zeros.
            advance_S: bool; a sequence for which it is false leaves its slot as it is. None: all true.
        """
        ...
