"""Mixture of experts: gate, routed experts, shared expert; sliced over all ranks or whole experts spread over them.

T tokens of this lane, A tokens of all lanes, N tokens this rank dispatches, E experts of the model, K experts a
token, I expert columns held here, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.comm import Comm
from shards.cuts import token_range
from shards.dispatch import collect, dispatch, plan_exchange
from shards.int_weights import ExpertWeights
from shards.linear import DenseMlp, Runtime
from shards.loading import Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """An expert every token takes, scaled by a sigmoid gate; its columns are cut as the routed experts' are."""

    mlp: DenseMlp
    gate_1C: Tensor

    def partial(self, runtime: Runtime, x_TC: Tensor, *, wide: bool) -> Tensor:
        """This rank's part of the sum, ungated -> [T, C]."""
        inner = runtime.kernels.silu_mul(runtime.kernels.linear(x_TC, self.mlp.gate_up_2IC))
        down = self.mlp.down_proj
        return runtime.kernels.linear(inner, down.weight_NC, groups=down.groups, wide=wide)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """One layer's experts, as far as this rank holds them."""

    gate_EC: Tensor
    gate_up_E2IC: ExpertWeights
    down_ECI: ExpertWeights
    shared: SharedExpert | None
    top_k: int
    renormalize: bool
    groups: int
    spread: bool
    """Whole experts spread over the ranks; else a slice of every expert on each rank."""

    @staticmethod
    def load(loader: Loader, prefix: str) -> "Moe":
        """The MoE block whose tensors start with `prefix`."""
        config, cuts = loader.config, loader.cuts
        gate_up, down = loader.experts(f"{prefix}.experts")
        shared, width = None, config.shared_expert_intermediate_size
        if width:
            mlp = loader.mlp(f"{prefix}.shared_expert", width, cuts.shared_columns, cuts.shared_groups)
            gate = loader.linear([(f"{prefix}.shared_expert_gate.weight", 1, slice(0, 1))])
            shared = SharedExpert(mlp=mlp, gate_1C=gate)
        return Moe(
            gate_EC=loader.linear([(f"{prefix}.gate.weight", config.num_experts, slice(0, config.num_experts))]),
            gate_up_E2IC=gate_up,
            down_ECI=down,
            shared=shared,
            top_k=config.num_experts_per_tok,
            renormalize=config.norm_topk_prob,
            groups=cuts.expert_groups,
            spread=len(cuts.experts) < config.num_experts,
        )

    def forward(self, runtime: Runtime, x_TC: Tensor, lane_tokens: tuple[int, ...]) -> Tensor:
        """The lane's tokens -> [T, C] on every rank of the lane. All ranks of all lanes take part, also with T = 0.

        Args:
            lane_tokens: T of every lane; not all zero.
        """
        if self.spread:
            comms = runtime.comms
            here = comms.dp.size == 1 and comms.world.near
            return self._forward_whole(runtime, x_TC) if here else self._forward_spread(runtime, x_TC)
        return self._forward_sliced(runtime, x_TC, lane_tokens)

    def _route(self, runtime: Runtime, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        with runtime.part("gate"):
            logits_TE = runtime.kernels.linear(x_TC, self.gate_EC)
            return runtime.kernels.route(logits_TE, self.top_k, renormalize=self.renormalize)

    def _forward_sliced(self, runtime: Runtime, x_TC: Tensor, lane_tokens: tuple[int, ...]) -> Tensor:
        """Every rank computes its columns for the tokens of all lanes; sums over all ranks."""
        comms, lane = runtime.comms, runtime.comms.dp.rank
        x_AC = gather_lanes(comms.dp, x_TC, lane_tokens)
        first = sum(lane_tokens[:lane])
        mine = slice(first, first + x_TC.shape[0])
        weights_AK, ids_AK = self._route(runtime, x_AC)
        with runtime.part("experts"):
            if comms.world.size == 1 or not runtime.exact:
                y_AC = runtime.kernels.weighted_experts(
                    x_AC, ids_AK, weights_AK, self.gate_up_E2IC, self.down_ECI, groups=self.groups
                )
                # Summing K before the ranks moves K times less; the order of float sums differs from one rank's.
                return comms.world.all_reduce(self._add_shared(runtime, x_AC, y_AC))[mine]
            return self._exact_sums(runtime, x_AC, weights_AK, ids_AK)[mine]

    def _exact_sums(self, runtime: Runtime, x_AC: Tensor, weights_AK: Tensor, ids_AK: Tensor) -> Tensor:
        """Each expert's result summed over the ranks, and rounded before the weighted sum, as whole experts' are."""
        kernels, world = runtime.kernels, runtime.comms.world
        y_AKC = kernels.experts(x_AC, ids_AK, self.gate_up_E2IC, self.down_ECI, groups=self.groups, wide=True)
        shared_AC = None if self.shared is None else self.shared.partial(runtime, x_AC, wide=True)
        out_AC, shared_AC = world.mix_sums(y_AKC, weights_AK, shared_AC, x_AC.dtype)
        return out_AC if shared_AC is None else self._gated(runtime, x_AC, out_AC, shared_AC)

    def _forward_whole(self, runtime: Runtime, x_TC: Tensor) -> Tensor:
        """Each rank computes its experts for the lane's tokens, which are on all ranks already."""
        kernels, world = runtime.kernels, runtime.comms.world
        weights_TK, ids_TK = self._route(runtime, x_TC)
        with runtime.part("experts"):
            held = len(self.down_ECI)
            local_TK = kernels.local_ids(ids_TK, world.rank * held, held)
            y_TKC = kernels.experts(x_TC, local_TK, self.gate_up_E2IC, self.down_ECI, groups=self.groups)
            return self._add_shared(runtime, x_TC, world.mix_rows(y_TKC, ids_TK, held, weights_TK))

    def _forward_spread(self, runtime: Runtime, x_TC: Tensor) -> Tensor:
        """Each rank of the lane dispatches its part of the lane's tokens to the ranks of their experts."""
        kernels, comms, T = runtime.kernels, runtime.comms, x_TC.shape[0]
        held = token_range(T, comms.tp.size, comms.tp.rank)
        x_NC = x_TC[held.start : held.stop]
        weights_NK, ids_NK = x_NC.new_zeros(0, self.top_k), x_NC.new_zeros(0, self.top_k, dtype=torch.int64)
        if len(held):
            weights_NK, ids_NK = self._route(runtime, x_NC)
        with runtime.part("experts"):
            exchange = plan_exchange(comms.world, ids_NK, self.gate_EC.shape[0])
            x_RC = dispatch(comms.world, exchange, x_NC)
            y_RC = x_RC
            if x_RC.shape[0]:
                ids_R1 = exchange.local_experts_R.unsqueeze(1)
                y_RC = kernels.experts(x_RC, ids_R1, self.gate_up_E2IC, self.down_ECI, groups=self.groups).squeeze(1)
            y_NKC = collect(comms.world, exchange, y_RC)
            if not T:
                return x_TC
            out_NC = self._add_shared(runtime, x_NC, kernels.combine(y_NKC, weights_NK)) if len(held) else x_NC
            return gather_padded(comms.tp, out_NC, -(-T // comms.tp.size))[:T]

    def _add_shared(self, runtime: Runtime, x_TC: Tensor, y_TC: Tensor) -> Tensor:
        """The gated shared expert onto what the routed ones gave."""
        if self.shared is None:
            return y_TC
        return self._gated(runtime, x_TC, y_TC, self.shared.partial(runtime, x_TC, wide=False))

    def _gated(self, runtime: Runtime, x_TC: Tensor, y_TC: Tensor, shared_TC: Tensor) -> Tensor:
        """y and the shared expert's result, scaled by its gate."""
        assert self.shared is not None
        gate_T1 = runtime.kernels.linear(x_TC, self.shared.gate_1C)
        return runtime.kernels.add_gated(y_TC, shared_TC, gate_T1)


def gather_padded(comm: Comm, x_NC: Tensor, rows: int) -> Tensor:
    """Every rank's rows, each rank's padded with zeros to `rows` -> [size * rows, C]."""
    missing = rows - x_NC.shape[0]
    if missing:
        x_NC = torch.cat((x_NC, x_NC.new_zeros(missing, x_NC.shape[1])))
    return comm.all_gather(x_NC)


def gather_lanes(dp: Comm, x_TC: Tensor, lane_tokens: tuple[int, ...]) -> Tensor:
    """The tokens of all lanes, lane by lane -> [A, C]."""
    if dp.size == 1:
        return x_TC
    longest = max(lane_tokens)
    padded = gather_padded(dp, x_TC, longest)
    if min(lane_tokens) == longest:
        return padded
    return torch.cat([padded[d * longest : d * longest + count] for d, count in enumerate(lane_tokens)])
