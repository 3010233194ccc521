"""Trainable layers of Qwen3-MoE and Qwen3-Next in plain torch; parameters have the checkpoint's names.

Sources: transformers' Qwen3-MoE and Qwen3-Next models; the chunked delta rule is that of "Gated Delta Networks"
(Yang et al., 2024). B sequences, T tokens each, H hidden size, N heads, D head size, E experts, K experts per token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from shards.config import ModelConfig

CHUNK = 16
"""Tokens of the delta rule that are solved at once; the lengths of batches are multiples of it."""


class RmsNorm(nn.Module):
    """RMS norm over the last axis in float32; zero-centred ones multiply by 1 + weight."""

    def __init__(self, width: int, eps: float, *, zero_centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero_centred else torch.ones(width))
        self._eps, self._zero_centred = eps, zero_centred

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Any float dtype in, float32 out."""
        weight = 1 + self.weight if self._zero_centred else self.weight
        return functional.rms_norm(x.float(), weight.shape, weight, self._eps)


class Attention(nn.Module):
    """Causal attention with normed and rotated queries and keys; gated in Qwen3-Next."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self._gated = config.attention_gated
        width, kv_width = self._heads * self._dim, self._kv_heads * self._dim
        self.q_proj = _linear(config.hidden_size, width * (2 if self._gated else 1))
        self.k_proj = _linear(config.hidden_size, kv_width)
        self.v_proj = _linear(config.hidden_size, kv_width)
        self.o_proj = _linear(width, config.hidden_size, zero=True)
        self.q_norm = RmsNorm(self._dim, config.rms_norm_eps, zero_centred=config.zero_centred_norm)
        self.k_norm = RmsNorm(self._dim, config.rms_norm_eps, zero_centred=config.zero_centred_norm)
        self._rotary_dim, self._theta = config.rope.rotary_dim, config.rope.theta

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        batch, length, _ = x_BTH.shape
        query, gate = self.q_proj(x_BTH).view(batch, length, self._heads, -1), None
        if self._gated:
            query, gate = query.chunk(2, dim=-1)
        key = self.k_proj(x_BTH).view(batch, length, self._kv_heads, self._dim)
        value = self.v_proj(x_BTH).view(batch, length, self._kv_heads, self._dim)
        angles = self._angles(length)
        query, key = self._rotate(self.q_norm(query), angles), self._rotate(self.k_norm(key), angles)
        repeat = self._heads // self._kv_heads
        q, k, v = (part.transpose(1, 2) for part in (query.to(value.dtype), key.to(value.dtype), value))
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj(out.reshape(batch, length, -1))

    def _angles(self, length: int) -> Tensor:
        steps = torch.arange(0, self._rotary_dim, 2) / self._rotary_dim
        return torch.outer(torch.arange(length), self._theta**-steps)[:, None, :]

    def _rotate(self, x_BTND: Tensor, angles: Tensor) -> Tensor:
        turned, rest = x_BTND[..., : self._rotary_dim], x_BTND[..., self._rotary_dim :]
        first, second = turned.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class CausalConv(nn.Module):
    """A convolution over time of each channel by itself."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-0.5, 0.5))

    @override
    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]; the last tap is the position itself."""
        weight_CK, length = self.weight.squeeze(1), x_BTC.shape[1]
        taps = weight_CK.shape[1]
        padded = functional.pad(x_BTC, (0, 0, taps - 1, 0))
        out = padded[:, :length] * weight_CK[:, 0]
        for tap in range(1, taps):
            out = out + padded[:, tap : tap + length] * weight_CK[:, tap]
        return out


class DeltaNet(nn.Module):
    """Gated delta rule with a causal convolution before and a gated norm behind."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._key_heads, self._value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self._key_dim, self._value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self._key_heads * self._key_dim, self._value_heads * self._value_dim
        self._keys, self._values, self._eps = keys, values, config.rms_norm_eps
        self.in_proj_qkvz = _linear(config.hidden_size, 2 * keys + 2 * values)
        self.in_proj_ba = _linear(config.hidden_size, 2 * self._value_heads)
        self.conv1d = CausalConv(2 * keys + values, config.linear_conv_kernel_dim)
        # Decay a token: the slowest head remembers for about a hundred tokens at first, the fastest for a few.
        self.A_log = nn.Parameter(torch.linspace(0.1, 4, self._value_heads).log())
        self.dt_bias = nn.Parameter(torch.full((self._value_heads,), -2.0))
        self.norm = RmsNorm(self._value_dim, config.rms_norm_eps, zero_centred=False)
        self.out_proj = _linear(values, config.hidden_size, zero=True)

    @override
    def forward(self, x_BTH: Tensor) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        batch, length, _ = x_BTH.shape
        ratio = self._value_heads // self._key_heads
        value_width = ratio * self._value_dim
        grouped = self.in_proj_qkvz(x_BTH).view(batch, length, self._key_heads, -1)
        q, k, v, z = grouped.split([self._key_dim, self._key_dim, value_width, value_width], dim=-1)
        b, a = self.in_proj_ba(x_BTH).view(batch, length, self._key_heads, -1).chunk(2, dim=-1)
        mixed = functional.silu(self.conv1d(torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)))
        q, k, v = mixed.split([self._keys, self._keys, self._values], dim=-1)
        q, k = (self._unit(part.view(batch, length, self._key_heads, -1), ratio) for part in (q, k))
        beta = b.float().sigmoid().flatten(2)
        decay = -self.A_log.exp() * functional.softplus(a.float().flatten(2) + self.dt_bias)
        v = v.float().view(batch, length, self._value_heads, -1)
        out = chunked_delta_rule(q * self._key_dim**-0.5, k, v, decay, beta)
        gated = self.norm(out) * functional.silu(z.float().reshape(batch, length, self._value_heads, -1))
        return self.out_proj(gated.flatten(2))

    def _unit(self, x_BTND: Tensor, ratio: int) -> Tensor:
        x = x_BTND.float()
        return (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(ratio, dim=2)


def chunked_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """S = S * exp(decay); S += k (v - S^T k) beta; out = S^T q, in chunks, float32.

    Args:
        q: scaled unit queries [B, T, N, Dk], T a multiple of the chunk.
        k: unit keys [B, T, N, Dk].
        v: values [B, T, N, Dv].
        decay: logarithm of each step's factor [B, T, N].
        beta: share of the correction that is written [B, T, N].

    Returns:
        [B, T, N, Dv].
    """
    with torch.autocast("cpu", enabled=False):
        chunks = q.shape[1] // CHUNK
        # [B, N, chunk, position, D]
        q, k, v = (part.unflatten(1, (chunks, CHUNK)).permute(0, 3, 1, 2, 4) for part in (q, k, v))
        decay, beta = (part.unflatten(1, (chunks, CHUNK)).permute(0, 3, 1, 2) for part in (decay, beta))
        total = decay.cumsum(-1)
        later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
        between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        k_beta = k * beta.unsqueeze(-1)
        system = (k_beta @ k.mT) * between
        right = torch.cat([v * beta.unsqueeze(-1), k_beta * total.exp().unsqueeze(-1)], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        values, reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        inside = (q @ k.mT) * between
        q_in = q * total.exp().unsqueeze(-1)
        k_out = k * (total[..., -1:] - total).exp().unsqueeze(-1)
        factor = total[..., -1].exp()[..., None, None]
        state, outs = torch.zeros(()), list[Tensor]()
        for index in range(chunks):
            new = values[:, :, index]
            if index:
                new = new - reads[:, :, index] @ state
            out = inside[:, :, index] @ new
            outs.append(out + q_in[:, :, index] @ state if index else out)
            state = state * factor[:, :, index] + k_out[:, :, index].mT @ new
        return torch.stack(outs, dim=2).flatten(2, 3).transpose(1, 2)


class Experts(nn.Module):
    """All experts of a layer as two stacks; each works on the rows that chose it, padded to the busiest expert's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden, width))

    @override
    def forward(self, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Weighted sum [T, H] of each token's experts."""
        tokens, top_k = ids_TK.shape
        ids = ids_TK.flatten()
        counts = torch.bincount(ids, minlength=self.gate_up_proj.shape[0])
        order = ids.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        capacity = int(counts.max())
        slots = torch.empty_like(ids)
        slots[order] = ids[order] * capacity + torch.arange(len(ids)) - starts[ids[order]]
        rows = torch.full((len(counts) * capacity,), tokens)
        rows[slots] = torch.arange(len(ids)) // top_k
        padded = torch.cat([x_TH, x_TH.new_zeros(1, x_TH.shape[1])])
        gathered = padded.index_select(0, rows).view(len(counts), capacity, -1)
        gate, up = (gathered @ self.gate_up_proj.mT.to(x_TH.dtype)).chunk(2, dim=-1)
        out = (functional.silu(gate) * up) @ self.down_proj.mT.to(x_TH.dtype)
        chosen = out.flatten(0, 1).index_select(0, slots).view(tokens, top_k, -1)
        return (chosen * weights_TK.unsqueeze(-1).to(chosen.dtype)).sum(1)


class Mlp(nn.Module):
    """Gated MLP, here the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = _linear(hidden, width), _linear(hidden, width)
        self.down_proj = _linear(width, hidden, zero=True)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    """Gate, routed experts and, in Qwen3-Next, a shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._top_k = config.num_experts_per_tok
        self.gate = _linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)
        self._shared = config.shared_expert_intermediate_size > 0
        if self._shared:
            self.shared_expert = Mlp(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = _linear(config.hidden_size, 1)

    @override
    def forward(self, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, T, H], and the loss that is 1 when all experts get equal shares (Switch Transformer)."""
        x_TH = x_BTH.flatten(0, 1)
        shares_TE = self.gate(x_TH).float().softmax(-1)
        weights_TK, ids_TK = shares_TE.topk(self._top_k, dim=-1)
        used_E = torch.bincount(ids_TK.flatten(), minlength=shares_TE.shape[1]) / ids_TK.numel()
        balance = shares_TE.shape[1] * (used_E * shares_TE.mean(0)).sum()
        x_low = x_TH.bfloat16() if torch.is_autocast_enabled("cpu") else x_TH
        out = self.experts(x_low, weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK)
        if self._shared:
            out = out + self.shared_expert(x_TH) * self.shared_expert_gate(x_TH).sigmoid()
        return out.view_as(x_BTH), balance


def _linear(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    """What is added to the residual stream begins at zero, so that embeddings reach the head untouched at first."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0 if zero else inputs**-0.5)
    return layer
