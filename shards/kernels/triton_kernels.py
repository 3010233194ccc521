"""The operators on a GPU, in Triton. Imports triton.

A row's result depends on the row only, whatever else is in the batch and however a prompt is cut: tiles and the order
of sums follow from the model's sizes. Sums over ranks are not brought into an order (`groups`), so `deterministic` is
not claimed. Nothing here waits for the device, so that a decode step can be captured as a CUDA graph.
"""

from torch import Tensor

from shards.int_weights import ExpertWeights
from shards.kernels import triton_attention, triton_delta, triton_matmul, triton_pointwise
from shards.kernels.interface import DeltaWeights
from shards.kernels.torch_kernels import TorchKernels


class TritonKernels:
    """Kernels of Triton and torch; see shards.kernels.interface for each operator's contract."""

    name = "triton"
    deterministic = False

    def __init__(self) -> None:
        self._torch = TorchKernels()

    def lay_out(self, weight_NC: Tensor, *, groups: int = 1) -> Tensor:
        """As it is."""
        return weight_NC

    def lay_out_experts(self, gate_up_E2IC: Tensor, down_ECI: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
        """As they are."""
        return gate_up_E2IC, down_ECI

    def take_rows(self, weight_NC: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of a weight, or zeros."""
        return self._torch.embed(weight_NC, ids_T)

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """A fixed order of sums: the vendor's matmul picks one by the number of rows. In groups, plain torch."""
        if groups == 1:
            return triton_matmul.linear(x_TC, weight_NC, bias_N, wide=wide)
        return self._torch.linear(x_TC, weight_NC, bias_N, groups=groups, wide=wide)

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """A row a program."""
        return triton_pointwise.rms_norm(x, weight_D, eps, zero_centred=zero_centred)

    def add_rms_norm(
        self, x_TC: Tensor, y_TC: Tensor, weight_C: Tensor, eps: float, *, zero_centred: bool
    ) -> tuple[Tensor, Tensor]:
        """A row a program."""
        return triton_pointwise.add_rms_norm(x_TC, y_TC, weight_C, eps, zero_centred=zero_centred)

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half, not rounded in between."""
        return triton_pointwise.silu_mul(gate_up_TI2)

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
        """A head of a token a program."""
        tensors = (qkv_TN, q_norm_D, k_norm_D, eps, cos_TR, sin_TR, k_pool_NHPD, v_pool_NHPD, slots_T)
        return triton_pointwise.attention_inputs(*tensors, gated=gated, zero_centred=zero_centred)

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
        """Reads keys and values where they lie; spreads long contexts of few queries over programs."""
        pools = (k_pool_NHPD, v_pool_NHPD)
        return triton_attention.attention(q_THD, *pools, tables_SB, query_start_S1, context_lens_S, scale, gate_THD)

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """A token a program; of equals the lower id first."""
        return triton_matmul.route(logits_TE, top_k, renormalize=renormalize)

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
        """Grouped matmuls over the hit experts; sums are float32 whatever `groups`, their order is the tiles'."""
        # Experts in integers are refused before a rank starts.
        assert isinstance(gate_up_E2IC, Tensor)
        assert isinstance(down_ECI, Tensor)
        if groups < 1 or down_ECI.shape[2] % groups:
            raise ValueError(f"groups={groups} must be at least 1 and divide I={down_ECI.shape[2]}")
        return triton_matmul.experts(x_TC, ids_TK, gate_up_E2IC, down_ECI, wide=wide)

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
        """`experts`, then the weighted sum over K."""
        return self.combine(self.experts(x_TC, ids_TK, gate_up_E2IC, down_ECI, groups=groups), weights_TK)

    def combine(self, y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y, in float32."""
        return triton_matmul.combine(y_TKC, weights_TK)

    def add_gated(self, x_TC: Tensor, shared_TC: Tensor, gate_T1: Tensor) -> Tensor:
        """x + shared * sigmoid(gate), not rounded in between."""
        return triton_pointwise.add_gated(x_TC, shared_TC, gate_T1)

    def best_tokens(self, logits_NV: Tensor, vocab_size: int) -> Tensor:
        """torch's argmax, which takes the first of equals."""
        return self._torch.best_tokens(logits_NV, vocab_size)

    def best_of_part(self, logits_NV: Tensor, size: int, first: int) -> Tensor:
        """torch's."""
        return self._torch.best_of_part(logits_NV, size, first)

    def best_of_pairs(self, pairs_PN2: Tensor) -> Tensor:
        """torch's."""
        return self._torch.best_of_pairs(pairs_PN2)

    def embed(self, table_VC: Tensor, ids_T: Tensor, first: int = 0) -> Tensor:
        """torch's."""
        return self._torch.embed(table_VC, ids_T, first)

    def beside(self, a_TC: Tensor, b_TC: Tensor) -> Tensor:
        """torch's."""
        return self._torch.beside(a_TC, b_TC)

    def local_ids(self, ids_TK: Tensor, first: int, held: int) -> Tensor:
        """torch's."""
        return self._torch.local_ids(ids_TK, first, held)

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
        """Token by token, also for long runs: nothing follows from the chunks, and the state stays in registers."""
        states = (conv_state_MQW, state_MVDD)
        return triton_delta.delta_net(projected_TN, weights, *states, slots_S, query_start_S1, fresh_S, advance_S)
