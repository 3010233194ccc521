"""The operators in plain torch: runs on CPU and CUDA, rounds where transformers does, promises no bits."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from shards.comm import tree_sum
from shards.kernels.torch_delta import gated_delta_rule

L2_EPS = 1e-6


class TorchKernels:
    """Kernels built of torch operators; see shards.kernels.interface for each operator's contract."""

    name = "torch"
    deterministic = False

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
        normed = _normalise(x, eps)
        if zero_centred:
            return (normed * (1.0 + weight_D.float())).to(x.dtype)
        return weight_D * normed.to(x.dtype)

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """weight * rms(x) * silu(gate) over the last axis, the gate in float32."""
        normed = weight_D * _normalise(x, eps).to(x.dtype)
        return (normed * functional.silu(gate.float())).to(x.dtype)

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        """silu(first half) * second half of the last axis."""
        gate, up = gate_up_TI2.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate) in x's dtype."""
        return x * torch.sigmoid(gate.to(x.dtype))

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate-half rotary on the first R of D, in x's dtype."""
        R = cos_TR.shape[1]
        turned, rest = x_THD[..., :R], x_THD[..., R:]
        cos, sin = cos_TR.to(x_THD.dtype).unsqueeze(1), sin_TR.to(x_THD.dtype).unsqueeze(1)
        low, high = turned.chunk(2, dim=-1)
        return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)

    def store_kv(self, k_THD: Tensor, v_THD: Tensor, k_pool_NHPD: Tensor, v_pool_NHPD: Tensor, slots_T: Tensor) -> None:
        """Write each token's k and v into its slot of the pools."""
        P = k_pool_NHPD.shape[2]
        block_T, offset_T = slots_T // P, slots_T % P
        k_pool_NHPD[block_T, :, offset_T] = k_THD
        v_pool_NHPD[block_T, :, offset_T] = v_THD

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
        """Causal paged attention: gathers each sequence's blocks, then scaled dot-product attention."""
        starts, contexts = query_start_S1.tolist(), context_lens_S.tolist()
        if _one_token_each(starts):
            return _attend_decode(q_THD, k_pool_NHPD, v_pool_NHPD, tables_SB, context_lens_S, max(contexts), scale)
        out_THD = torch.empty_like(q_THD)
        for s, context in enumerate(contexts):
            queries = slice(starts[s], starts[s + 1])
            count = queries.stop - queries.start
            if count == 0:
                continue
            k_HLD = _gather(k_pool_NHPD, tables_SB[s : s + 1], context)
            v_HLD = _gather(v_pool_NHPD, tables_SB[s : s + 1], context)
            keys = torch.arange(context, device=q_THD.device)
            seen_TL = keys <= torch.arange(context - count, context, device=q_THD.device).unsqueeze(1)
            q_HTD = q_THD[queries].transpose(0, 1).unsqueeze(0)
            out_HTD = functional.scaled_dot_product_attention(
                q_HTD, k_HLD, v_HLD, attn_mask=seen_TL, scale=scale, enable_gqa=True
            )
            out_THD[queries] = out_HTD[0].transpose(0, 1)
        return out_THD

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
        gate_up_E2IC: Tensor,
        down_ECI: Tensor,
        *,
        groups: int = 1,
        wide: bool = False,
    ) -> Tensor:
        """Each token through each of its experts, one hit expert after the other."""
        T, K = ids_TK.shape
        dtype = torch.float32 if wide else x_TC.dtype
        y_TKC = torch.zeros(T * K, down_ECI.shape[1], dtype=dtype, device=x_TC.device)
        order = torch.argsort(ids_TK.flatten(), stable=True)
        ids, counts = torch.unique_consecutive(ids_TK.flatten()[order], return_counts=True)
        for expert, pairs in zip(ids.tolist(), order.split(counts.tolist()), strict=True):
            if expert < 0:
                continue
            inner = self.silu_mul(functional.linear(x_TC[pairs // K], gate_up_E2IC[expert]))
            y_TKC[pairs] = self.linear(inner, down_ECI[expert], groups=groups, wide=wide)
        return y_TKC.view(T, K, down_ECI.shape[1])

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
        """The weighted sum over K of what `experts` gives."""
        y_TKC = self.experts(x_TC, ids_TK, gate_up_E2IC, down_ECI, groups=groups, wide=wide)
        return self.combine(y_TKC, weights_TK, x_TC)

    def combine(self, y_TKC: Tensor, weights_TK: Tensor, dtype_like: Tensor) -> Tensor:
        """Sum over K, in order, of weight * y, in float32."""
        total_TC = torch.zeros(y_TKC.shape[0], y_TKC.shape[2], device=y_TKC.device)
        for k in range(y_TKC.shape[1]):
            total_TC = total_TC + y_TKC[:, k].float() * weights_TK[:, k : k + 1]
        return total_TC.to(dtype_like.dtype)

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

    def delta_gates(self, b_TV: Tensor, a_TV: Tensor, a_log_V: Tensor, dt_bias_V: Tensor) -> tuple[Tensor, Tensor]:
        """beta = sigmoid(b) and g = -exp(A_log) * softplus(a + dt_bias), float32."""
        g_TV = -a_log_V.float().exp() * functional.softplus(a_TV.float() + dt_bias_V.float())
        return torch.sigmoid(b_TV).float(), g_TV

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
        """Gated delta rule: token by token for short runs, in chunks of 64 for long ones."""
        share = v_TVD.shape[1] // q_TKD.shape[1]
        q_TVD = (_unit(q_TKD) * q_TKD.shape[2] ** -0.5).repeat_interleave(share, dim=1)
        k_TVD = _unit(k_TKD).repeat_interleave(share, dim=1)
        before_SVDD = state_NVDD[slots_S].masked_fill(fresh_S.view(-1, 1, 1, 1), 0)
        out_TVD = torch.empty_like(v_TVD)
        for rows, tokens in _runs(query_start_S1.tolist()):
            q, k, v, beta, g = (
                x[tokens].unflatten(0, (rows.stop - rows.start, -1))
                for x in (q_TVD, k_TVD, v_TVD.float(), beta_TV, g_TV)
            )
            out, after = gated_delta_rule(q, k, v, beta, g, before_SVDD[rows])
            out_TVD[tokens] = out.flatten(0, 1).to(v_TVD.dtype)
            _advance(state_NVDD, slots_S[rows], after, advance_S, rows)
        return out_TVD


def _normalise(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _advance(state: Tensor, slots_S: Tensor, after: Tensor, advance_S: Tensor | None, rows: slice) -> None:
    """Write the slots of the sequences `rows`, but for those that are to be left as they are."""
    if advance_S is None:
        state[slots_S] = after
    else:
        state[slots_S[advance_S[rows]]] = after[advance_S[rows]]


def _unit(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + L2_EPS)


def _one_token_each(starts: list[int]) -> bool:
    return len(starts) > 1 and starts == list(range(len(starts)))


def _runs(starts: list[int]) -> list[tuple[slice, slice]]:
    """(sequences, tokens) to compute together: a step of single tokens as one batch, else each sequence alone."""
    if _one_token_each(starts):
        return [(slice(0, starts[-1]), slice(0, starts[-1]))]
    return [(slice(s, s + 1), slice(a, b)) for s, (a, b) in enumerate(itertools.pairwise(starts)) if b > a]


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
