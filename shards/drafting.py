"""After a step's tokens are drawn: keep the multi-token prediction layer's KV up to date, and draft.

N rows that draft, T tokens of the step, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.batch import StepBatch
from shards.cache import KvCache
from shards.linear import Runtime
from shards.model import Model
from shards.mtp import Mtp
from shards.rows import Rows, StepTensors
from shards.verify import Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafter:
    """What drafting needs of a rank."""

    runtime: Runtime
    model: Model
    mtp: Mtp
    rows: Rows
    cache: KvCache
    cos_LR: Tensor
    sin_LR: Tensor

    def run(
        self,
        step: StepTensors,
        hidden_TC: Tensor,
        draws: Draws,
        kept: list[int],
        lane_drafts: list[tuple[int, ...]],
        *,
        keeps: bool,
    ) -> None:
        """Write the layer's KV of the step's positions, then drafts behind the last tokens of the rows that want any.

        Args:
            hidden_TC: the main model's.
            kept: how many draws of each sampled row stay.
            lane_drafts: for each depth, how many rows of every lane draft that far. All ranks of all lanes take part.
            keeps: False leaves the layer's KV out; then no row of the lane drafts.
        """
        if not keeps and not any(map(any, lane_drafts)):
            return
        pools = self.cache.k_pools[-1], self.cache.v_pools[-1]
        if keeps and hidden_TC.shape[0]:
            self.mtp.store_kv(self.runtime, self._embed_next(step), hidden_TC, step, *pools)
        ends = [end - 1 for end in _ends_of_kept(draws, kept)]
        wanted = [i for i, drafts in enumerate(draws.drafts) if drafts]
        hidden_NC = hidden_TC[torch.tensor([draws.tokens_N[ends[i]] for i in wanted], dtype=torch.int64)]
        for depth, lanes in enumerate(lane_drafts):
            if not any(lanes):
                return
            still = [n for n, i in enumerate(wanted) if draws.drafts[i] > depth]
            wanted = [wanted[n] for n in still]
            rows = [draws.rows[i] for i in wanted]
            positions = [draws.positions_N[ends[i]] - 1 + depth for i in wanted]
            hidden_NC = self._draft(rows, positions, hidden_NC[torch.tensor(still, dtype=torch.int64)], lanes)

    def _draft(self, rows: list[int], positions: list[int], hidden_NC: Tensor, lanes: tuple[int, ...]) -> Tensor:
        """Draft the tokens two behind `positions` -> the layer's hidden states there."""
        batch = StepBatch(rows_S=rows, first_S=positions, counts_S=[1] * len(rows), samples_S=[0] * len(rows))
        step = self.rows.tensors(batch, self.cos_LR, self.sin_LR, lanes)
        embedded_NC = self._embed_next(step) if rows else hidden_NC
        pools = self.cache.k_pools[-1], self.cache.v_pools[-1]
        hidden_NC = self.mtp.forward(self.runtime, embedded_NC, hidden_NC, step, *pools)
        if rows:
            drafts_N = self.model.lm_head.best(self.runtime, hidden_NC)
            self.rows.store(rows, [position + 2 for position in positions], drafts_N)
        return hidden_NC

    def _embed_next(self, step: StepTensors) -> Tensor:
        return self.model.embed_tokens.embed(self.runtime, self.rows.next_tokens(step))


def _ends_of_kept(draws: Draws, kept: list[int]) -> list[int]:
    """For each sampled row, the index behind its last draw that stays."""
    ends: list[int] = []
    begin = 0
    for count, stay in zip(draws.counts, kept, strict=True):
        ends.append(begin + stay)
        begin += count
    return ends
