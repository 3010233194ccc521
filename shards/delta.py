"""Gated delta rule layer (linear attention), its key heads and their value heads spread over the lane's ranks.

T tokens of the step, C hidden size, K key heads and V value heads held here, Dk and Dv their dims, Q channels of the
convolution held here ([q | k | v]), W its width, M state slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.kernels.interface import DeltaWeights
from shards.linear import RowLinear, Runtime
from shards.loading import Loader, as_slice
from shards.rows import StepTensors
from shards.segments import Segment
from shards.states import LayerStates
from shards.verify import Replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """in_proj -> causal conv -> gated delta rule -> gated norm -> out_proj."""

    in_proj_NC: Tensor
    """Rows [q | k | v | z | b | a] of the heads held here."""
    weights: DeltaWeights
    out_proj: RowLinear

    @staticmethod
    def load(loader: Loader, prefix: str) -> "Delta":
        """The delta layer whose tensors start with `prefix`."""
        config, held = loader.config, loader.cuts.key_heads
        share = config.linear_num_value_heads // config.linear_num_key_heads
        value_heads, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
        values = as_slice(held, share)
        return Delta(
            in_proj_NC=loader.joined(_load_in_proj(loader, prefix)),
            weights=DeltaWeights(
                conv1d_QW=_load_conv(loader, f"{prefix}.conv1d.weight"),
                a_log_V=loader.tensor(f"{prefix}.A_log", (value_heads,), values, dtype=torch.float32),
                dt_bias_V=loader.tensor(f"{prefix}.dt_bias", (value_heads,), values, dtype=torch.float32),
                norm_D=loader.tensor(f"{prefix}.norm.weight", (value_dim,)),
                num_key_heads=len(held),
                key_dim=config.linear_key_head_dim,
                eps=config.rms_norm_eps,
            ),
            out_proj=loader.row_linear(
                f"{prefix}.out_proj.weight",
                value_heads * value_dim,
                as_slice(held, share * value_dim),
                loader.cuts.key_head_groups,
            ),
        )

    def forward(self, runtime: Runtime, x_TC: Tensor, step: StepTensors, states: LayerStates) -> Tensor:
        """Advances the states of the step's slots -> [T, C] on every rank of the lane."""
        projected_TN = runtime.kernels.linear(x_TC, self.in_proj_NC)
        if step.verified_U is not None:
            step.delta_inputs.append(projected_TN[step.verified_U])
        if step.segments:
            pieces = [self._run(runtime, projected_TN, part, states) for part in step.segments]
            out_TN = torch.cat(pieces)
        else:
            where = (step.state_slots_S, step.query_start_S1, step.fresh_S, step.advance_S)
            out_TN = runtime.kernels.delta_net(projected_TN, self.weights, states.conv_MQW, states.delta_MVDD, *where)
        return self.out_proj.forward(runtime, runtime.comms.tp, out_TN)

    def _run(self, runtime: Runtime, projected_TN: Tensor, part: Segment, states: LayerStates) -> Tensor:
        """One segment's tokens, and then the states to keep behind them."""
        projected_UN = projected_TN[part.first_token : part.end_token]
        where = (part.state_slots_S, part.query_start_S1, part.fresh_S, part.advance_S)
        out_UN = runtime.kernels.delta_net(projected_UN, self.weights, states.conv_MQW, states.delta_MVDD, *where)
        if part.sources_K.shape[0]:
            states.keep(part.sources_K, part.targets_K)
        return out_UN

    def replay(self, runtime: Runtime, projected_UN: Tensor, replay: Replay, states: LayerStates) -> None:
        """Advance the states of rows that verified drafts over their accepted tokens: `forward`'s bits."""
        where = (replay.state_slots_S, replay.query_start_S1, replay.fresh_S)
        kept_KN = replay.take(projected_UN)
        runtime.kernels.delta_net(kept_KN, self.weights, states.conv_MQW, states.delta_MVDD, *where)


def _load_in_proj(loader: Loader, prefix: str) -> list[Tensor]:
    """What makes q, k, v, z, b and a of the heads held here, one kind after the other."""
    if loader.config.linear_split_projections:
        return _load_split_in_proj(loader, prefix)
    # Rows lie per key head as [q | k | v | z] and [b | a].
    config, held = loader.config, loader.cuts.key_heads
    share = config.linear_num_value_heads // config.linear_num_key_heads
    key_dim, value_dim, hidden = config.linear_key_head_dim, share * config.linear_value_head_dim, config.hidden_size
    kinds = {"qkvz": (key_dim, key_dim, value_dim, value_dim), "ba": (share, share)}
    pieces: list[Tensor] = []
    for name, sizes in kinds.items():
        shape = (config.linear_num_key_heads * sum(sizes), hidden)
        rows = loader.tensor(f"{prefix}.in_proj_{name}.weight", shape, as_slice(held, sum(sizes)))
        pieces += [piece.flatten(0, 1) for piece in rows.view(len(held), -1, hidden).split(sizes, dim=1)]
    return pieces


def _load_split_in_proj(loader: Loader, prefix: str) -> list[Tensor]:
    """in_proj_qkv has [q | k | v] of all heads; z, b and a have tensors of their own."""
    config, held = loader.config, loader.cuts.key_heads
    value_heads, hidden = config.linear_num_value_heads, config.hidden_size
    share = value_heads // config.linear_num_key_heads
    rows, slices = _qkv_slices(loader)
    pieces = [loader.tensor(f"{prefix}.in_proj_qkv.weight", (rows, hidden), part) for part in slices]
    for kind, width in {"z": config.linear_value_head_dim, "b": 1, "a": 1}.items():
        part = as_slice(held, share * width)
        pieces.append(loader.tensor(f"{prefix}.in_proj_{kind}.weight", (value_heads * width, hidden), part))
    return pieces


def _load_conv(loader: Loader, name: str) -> Tensor:
    """Channels [q | k | v] of the heads held here -> [Q, W]."""
    rows, slices = _qkv_slices(loader)
    shape = (rows, 1, loader.config.linear_conv_kernel_dim)
    return torch.cat([loader.tensor(name, shape, part) for part in slices]).squeeze(1)


def _qkv_slices(loader: Loader) -> tuple[int, list[slice]]:
    """Rows of [q | k | v] of all heads, and the slices of q, k and v held here."""
    config, held = loader.config, loader.cuts.key_heads
    share = config.linear_num_value_heads // config.linear_num_key_heads
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    key_part = as_slice(held, config.linear_key_head_dim)
    value_part = as_slice(held, share * config.linear_value_head_dim)
    parts = [(0, key_part), (keys, key_part), (2 * keys, value_part)]
    return 2 * keys + values, [slice(base + part.start, base + part.stop) for base, part in parts]
