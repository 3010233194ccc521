"""The operators in plain torch: runs on CPU and CUDA, rounds where transformers does, promises no bits."""

import torch
from torch import Tensor
from torch.nn import functional

from shards.batch import NO_TOKEN
from shards.comm import tree_sum
from shards.int_weights import ExpertWeights, strips_of
from shards.kernels.interface import DeltaWeights
from shards.kernels.torch_delta import causal_conv, delta_gates, delta_rule, gated_rms_norm, normalise, one_token_each

_MASK_ELEMENTS = 1 << 24
"""Queries times keys whose mask is in memory at once."""


class TorchKernels:
    """Kernels built of torch operators; see shards.kernels.interface for each operator's contract."""

    name = "torch"
    deterministic = False

    def lay_out(self, weight_NC: Tensor, *, groups: int = 1) -> Tensor:
        """As it is."""
        return weight_NC

    def lay_out_experts(self, gate_up_E2IC: Tensor, down_ECI: Tensor, *, groups: int = 1) -> tuple[Tensor, Tensor]:
        """As they are."""
        return gate_up_E2IC, down_ECI

    def take_rows(self, weight_NC: Tensor, ids_T: Tensor) -> Tensor:
        """Rows of a weight, or zeros."""
        return self.embed(weight_NC, ids_T)

    def linear(
        self, x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, *, groups: int = 1, wide: bool = False
    ) -> Tensor:
        """x @ weight.T (+ bias) -> [T, N]; the parts of C are summed in float32."""
        C = x_TC.shape[1]
        if groups < 1 or C % groups:
            raise ValueError(f"groups={groups} must be at least 1 and divide C={C}")
        if groups == 1 and not (wide and x_TC.dtype != torch.float32):
            return functional.linear(x_TC, weight_NC, bias_N)
        x, w = x_TC.float().chunk(groups, dim=1), weight_NC.float().chunk(groups, dim=1)
        y_TN = tree_sum([functional.linear(a, b) for a, b in zip(x, w, strict=True)])
        if bias_N is not None:
            y_TN = y_TN + bias_N.float()
        return y_TN if wide else y_TN.to(x_TC.dtype)

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float, *, zero_centred: bool) -> Tensor:
        """RMS norm over the last axis; a zero-centred weight is applied in float32, the other after rounding."""
        normed = normalise(x, eps)
        if zero_centred:
            return (normed * (1.0 + weight_D.float())).to(x.dtype)
        return weight_D * normed.to(x.dtype)

    def add_rms_norm(
        self, x_TC: Tensor, y_TC: Tensor, weight_C: Tensor, eps: float, *, zero_centred: bool
    ) -> tuple[Tensor, Tensor]:
        """x + y, and its RMS norm."""
        x_TC = x_TC + y_TC
        return x_TC, self.rms_norm(x_TC, weight_C, eps, zero_centred=zero_centred)

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        gate, up = gate_up_TI2.chunk(2, dim=-1)
        return functional.silu(gate) * up

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
        (T, width), (_, Hkv, P, D) = qkv_TN.shape, k_pool_NHPD.shape
        q_TN, k_TN, v_TN = qkv_TN.split((width - 2 * Hkv * D, Hkv * D, Hkv * D), dim=1)
        head = 2 * D if gated else D
        q_THD = q_TN.unflatten(1, (q_TN.shape[1] // head, head))[..., :D]
        k_THD, v_THD = k_TN.view(T, Hkv, D), v_TN.view(T, Hkv, D)
        if q_norm_D is not None:
            q_THD = self.rms_norm(q_THD, q_norm_D, eps, zero_centred=zero_centred)
        if k_norm_D is not None:
            k_THD = self.rms_norm(k_THD, k_norm_D, eps, zero_centred=zero_centred)
        goes_T = slots_T >= 0
        block_U, offset_U = slots_T[goes_T] // P, slots_T[goes_T] % P
        k_pool_NHPD[block_U, :, offset_U] = rotary(k_THD, cos_TR, sin_TR)[goes_T]
        v_pool_NHPD[block_U, :, offset_U] = v_THD[goes_T]
        return rotary(q_THD, cos_TR, sin_TR)

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
        """Causal paged attention: gathers each sequence's blocks, then scaled dot-product attention."""
        out_THD = _attend(q_THD, k_pool_NHPD, v_pool_NHPD, tables_SB, query_start_S1, context_lens_S, scale)
        return out_THD if gate_THD is None else out_THD * torch.sigmoid(gate_THD)

    def route(self, logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax over all experts and the best top_k; weights stay float32."""
        # Divide in float32: in bfloat16 a token's eight weights summed to 0.9946-1.0054.
        weights_TK, ids_TK = torch.topk(torch.softmax(logits_TE.float(), dim=-1), top_k, dim=-1)
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
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
        """Each token through each of its experts, one hit expert after the other."""
        T, K = ids_TK.shape
        dtype = torch.float32 if wide else x_TC.dtype
        y_TKC = torch.zeros(T * K, x_TC.shape[1], dtype=dtype, device=x_TC.device)
        order = torch.argsort(ids_TK.flatten(), stable=True)
        ids, counts = torch.unique_consecutive(ids_TK.flatten()[order], return_counts=True)
        for expert, pairs in zip(ids.tolist(), order.split(counts.tolist()), strict=True):
            if expert < 0:
                continue
            gate_up_2IC, down_CI = _expert(gate_up_E2IC, down_ECI, expert, x_TC.shape[1])
            # Integers times scales are float32, and so are then the products; results are rounded as ever.
            inner = functional.linear(x_TC[pairs // K].to(gate_up_2IC.dtype), gate_up_2IC).to(x_TC.dtype)
            inner = self.silu_mul(inner).to(down_CI.dtype)
            y_TKC[pairs] = self.linear(inner, down_CI, groups=groups, wide=wide).to(dtype)
        return y_TKC.view(T, K, x_TC.shape[1])

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
        """The weighted sum over K of what `experts` gives."""
        return self.combine(self.experts(x_TC, ids_TK, gate_up_E2IC, down_ECI, groups=groups), weights_TK)

    def combine(self, y_TKC: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y, in float32."""
        total_TC = torch.zeros(y_TKC.shape[0], y_TKC.shape[2], device=y_TKC.device)
        for k in range(y_TKC.shape[1]):
            total_TC = total_TC + y_TKC[:, k].float() * weights_TK[:, k : k + 1]
        return total_TC.to(y_TKC.dtype)

    def add_gated(self, x_TC: Tensor, shared_TC: Tensor, gate_T1: Tensor) -> Tensor:
        """x + shared * sigmoid(gate) in x's dtype."""
        return x_TC + shared_TC * torch.sigmoid(gate_T1)

    def best_tokens(self, logits_NV: Tensor, vocab_size: int) -> Tensor:
        """Each row's largest logit."""
        logits_NV = logits_NV[:, :vocab_size]
        return torch.where(logits_NV.amax(dim=-1).isfinite(), logits_NV.argmax(dim=-1), NO_TOKEN)

    def best_of_part(self, logits_NV: Tensor, size: int, first: int) -> Tensor:
        """Each row's largest logit and its place."""
        if not size:
            return logits_NV.new_tensor([-torch.inf, first - 1], dtype=torch.float64).expand(len(logits_NV), 2)
        logits_NV = logits_NV[:, :size].double()
        best_N, places_N = logits_NV.max(dim=1)
        broken_N = logits_NV.isnan().any(dim=1) | best_N.isposinf()
        return torch.stack((best_N.masked_fill(broken_N, torch.nan), places_N + float(first)), dim=1)

    def best_of_pairs(self, pairs_PN2: Tensor) -> Tensor:
        """The best of several parts, of equals the first."""
        best_N, parts_N = pairs_PN2[:, :, 0].max(dim=0)
        places_N = pairs_PN2[:, :, 1].gather(0, parts_N.unsqueeze(0)).squeeze(0).long()
        return places_N.masked_fill(~best_N.isfinite(), NO_TOKEN)

    def embed(self, table_VC: Tensor, ids_T: Tensor, first: int = 0) -> Tensor:
        """Rows of a table; zeros for ids that are not in it."""
        rows_T = ids_T - first
        foreign_T = (rows_T < 0) | (rows_T >= table_VC.shape[0])
        return table_VC[rows_T.masked_fill(foreign_T, 0)].masked_fill(foreign_T.unsqueeze(1), 0)

    def beside(self, a_TC: Tensor, b_TC: Tensor) -> Tensor:
        """[a | b]."""
        return torch.cat((a_TC, b_TC), dim=1)

    def local_ids(self, ids_TK: Tensor, first: int, held: int) -> Tensor:
        """ids counted from `first`, or -1."""
        local_TK = ids_TK - first
        return local_TK.masked_fill((local_TK < 0) | (local_TK >= held), -1)

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
        """The gated delta net between its projections: token by token for short runs, in chunks of 64 for long ones."""
        (_, V, Dk, Dv), keys = state_MVDD.shape, weights.num_key_heads * weights.key_dim
        qkv_TQ, z_TN, b_TV, a_TV = projected_TN.split((2 * keys + V * Dv, V * Dv, V, V), dim=1)
        where = (slots_S, query_start_S1, fresh_S, advance_S)
        qkv_TQ = causal_conv(qkv_TQ, weights.conv1d_QW, conv_state_MQW, *where)
        q_TN, k_TN, v_TN = qkv_TQ.split((keys, keys, V * Dv), dim=1)
        beta_TV, g_TV = delta_gates(b_TV, a_TV, weights.a_log_V, weights.dt_bias_V)
        q_TKD, k_TKD, v_TVD = q_TN.unflatten(1, (-1, Dk)), k_TN.unflatten(1, (-1, Dk)), v_TN.unflatten(1, (-1, Dv))
        out_TVD = delta_rule(q_TKD, k_TKD, v_TVD, beta_TV, g_TV, state_MVDD, *where)
        return gated_rms_norm(out_TVD, z_TN.unflatten(1, (-1, Dv)), weights.norm_D, weights.eps).flatten(1)


def _expert(gate_up: ExpertWeights, down: ExpertWeights, expert: int, hidden: int) -> tuple[Tensor, Tensor]:
    """gate_up [2I, C] and down [C, I] of one expert."""
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        return gate_up[expert], down[expert]
    halves = [gate_up.widened(expert, down.columns, first) for first in (0, strips_of(down.columns))]
    return torch.cat(halves), down.widened(expert, hidden)


def rotary(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate-half rotary on the first R of D, in x's dtype; cos and sin float32 [T, R], both halves repeated."""
    R = cos_TR.shape[1]
    turned, rest = x_THD[..., :R], x_THD[..., R:]
    cos, sin = cos_TR.to(x_THD.dtype).unsqueeze(1), sin_TR.to(x_THD.dtype).unsqueeze(1)
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)


def _attend(
    q_THD: Tensor,
    k_pool_NHPD: Tensor,
    v_pool_NHPD: Tensor,
    tables_SB: Tensor,
    query_start_S1: Tensor,
    context_lens_S: Tensor,
    scale: float,
) -> Tensor:
    starts, contexts = query_start_S1.tolist(), context_lens_S.tolist()
    if one_token_each(starts):
        return _attend_decode(q_THD, k_pool_NHPD, v_pool_NHPD, tables_SB, context_lens_S, max(contexts), scale)
    out_THD = torch.empty_like(q_THD)
    for s, context in enumerate(contexts):
        queries = slice(starts[s], starts[s + 1])
        count = queries.stop - queries.start
        if count == 0:
            continue
        k_HLD = _gather(k_pool_NHPD, tables_SB[s : s + 1], context)
        v_HLD = _gather(v_pool_NHPD, tables_SB[s : s + 1], context)
        rows = max(1, _MASK_ELEMENTS // context)
        for first in range(queries.start, queries.stop, rows):
            part = slice(first, min(first + rows, queries.stop))
            # The last query of the part sees all keys before those of the queries behind it.
            out_THD[part] = _attend_part(q_THD[part], k_HLD, v_HLD, context - (queries.stop - part.stop), scale)
    return out_THD


def _attend_part(q_THD: Tensor, k_1GLD: Tensor, v_1GLD: Tensor, seen: int, scale: float) -> Tensor:
    """Queries that are the last of the first `seen` positions -> [T, H, D]."""
    positions = torch.arange(seen, device=q_THD.device)
    mask_TL = positions <= positions[-q_THD.shape[0] :].unsqueeze(1)
    q_1HTD = q_THD.transpose(0, 1).unsqueeze(0)
    out_1HTD = functional.scaled_dot_product_attention(
        q_1HTD, k_1GLD[:, :, :seen], v_1GLD[:, :, :seen], attn_mask=mask_TL, scale=scale, enable_gqa=True
    )
    return out_1HTD[0].transpose(0, 1)


def _gather(pool_NHPD: Tensor, tables_SB: Tensor, length: int) -> Tensor:
    """The first `length` positions of each sequence -> [S, H, length, D]."""
    blocks = -(-length // pool_NHPD.shape[2])
    return pool_NHPD[tables_SB[:, :blocks].long()].transpose(1, 2).flatten(2, 3)[:, :, :length]


def _attend_decode(
    q_SHD: Tensor, k_pool: Tensor, v_pool: Tensor, tables_SB: Tensor, contexts_S: Tensor, longest: int, scale: float
) -> Tensor:
    """One query a sequence, all sequences in one call, padded to the longest context."""
    # A padded table entry may hold any number; block 0 is as good as another, since its keys are masked.
    tables_SB = tables_SB.clamp(0, k_pool.shape[0] - 1)
    k_SHLD, v_SHLD = _gather(k_pool, tables_SB, longest), _gather(v_pool, tables_SB, longest)
    seen_SL = torch.arange(longest, device=q_SHD.device) < contexts_S.unsqueeze(1)
    # A masked key weighs 0, but 0 * NaN of a never written block would still be NaN.
    v_SHLD = v_SHLD.masked_fill(~seen_SL[:, None, :, None], 0)
    k_SHLD = k_SHLD.masked_fill(~seen_SL[:, None, :, None], 0)
    mask = seen_SL[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        q_SHD.unsqueeze(2), k_SHLD, v_SHLD, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.squeeze(2)
