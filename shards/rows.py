"""The sequences a rank holds, by row, and one step's batch as device tensors.

R rows, L positions a row can hold, B blocks a row can hold, S rows and T tokens of the step, N rows sampled in it,
R in cos_TR is the rotary dim.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.batch import RowSampling, RowStart, StepBatch
from shards.segments import Segment, cut

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What the layers need to know of a step."""

    tokens_T: Tensor
    """int64 token ids, the rows' tokens one after the other."""
    rows_T: Tensor
    """int64 row of each token."""
    positions_T: Tensor
    """int64 position of each token in its sequence."""
    cos_TR: Tensor
    sin_TR: Tensor
    slots_T: Tensor
    """int64 block * block_size + offset where each token's KV goes; -1: nowhere, it is there already."""
    tables_SB: Tensor
    """int32 block tables, as wide as the longest context needs."""
    query_start_S1: Tensor
    """int64 first token of each row; one more entry than rows."""
    context_lens_S: Tensor
    """int64 positions of each row after this step."""
    state_slots_S: Tensor
    """int64 recurrent-state slots."""
    fresh_S: Tensor
    """bool: the row starts from zero state."""
    lane_tokens: tuple[int, ...]
    """T of every lane."""
    advance_S: Tensor | None = None
    """bool: the row's recurrent state advances; rows that verify drafts leave theirs as it is. None: all advance."""
    segments: tuple[Segment, ...] = ()
    """Where recurrent states are kept behind the middle of a row: the pieces in which delta layers run the step."""
    verified_U: Tensor | slice | None = None
    """int64: which of the step's tokens are of rows that verify drafts; or a slice with all of those. None: no row
    does."""
    delta_inputs: list[Tensor] = field(default_factory=list)
    """Delta layers append, in order, their projections of those tokens [U, N]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpan:
    """Positions of one row whose prompt log probabilities the step gives."""

    row: int
    first_token: int
    """Index in the step's tokens."""
    first_position: int
    count: int
    num_top: int


class Rows:
    """Tokens, block tables and sampling of a rank's rows. Written by the rank's step only."""

    def __init__(self, *, max_rows: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        # One place more than positions that are computed: the last sampled token is stored too.
        self.tokens_RL = torch.zeros(max_rows, max_model_len + 1, dtype=torch.int64, device=device)
        self.tables_RB = np.zeros((max_rows, -(-max_model_len // block_size)), dtype=np.int32)
        self._num_blocks_R = np.zeros(max_rows, dtype=np.int64)
        self.num_stored_R = np.zeros(max_rows, dtype=np.int64)
        self.state_slots_R = np.zeros(max_rows, dtype=np.int64)
        self.prompt_lens = [0] * max_rows
        self.samplings = [RowSampling()] * max_rows
        self._shaped: set[int] = set()
        """Rows whose sampling is not plain."""

    def update(self, batch: StepBatch) -> None:
        """Carry out the batch's starts, then its grown block tables."""
        for start in batch.starts:
            self._start(start)
        for row, block in zip(batch.grown_rows, batch.grown_blocks, strict=True):
            self.tables_RB[row, self._num_blocks_R[row]] = block
            self._num_blocks_R[row] += 1

    def _start(self, start: RowStart) -> None:
        row, num_blocks = start.row, len(start.blocks)
        self.tokens_RL[row, : len(start.token_ids)] = torch.tensor(start.token_ids, dtype=torch.int64)
        self.tables_RB[row, :num_blocks] = start.blocks
        self._num_blocks_R[row] = num_blocks
        self.num_stored_R[row] = start.num_stored
        self.state_slots_R[row] = max(0, start.state_slot)
        self.prompt_lens[row] = start.prompt_len
        self.samplings[row] = start.sampling
        (self._shaped.discard if start.sampling.is_plain else self._shaped.add)(row)

    def are_plain(self, rows: list[int]) -> bool:
        """Whether the sampling of all these rows `is_plain`."""
        return self._shaped.isdisjoint(rows)

    def state_slots(self, rows: list[int]) -> list[int]:
        """The recurrent-state slots of these rows."""
        return self.state_slots_R[rows].tolist()

    def tensors(self, batch: StepBatch, cos_LR: Tensor, sin_LR: Tensor, lane_tokens: tuple[int, ...]) -> StepTensors:
        """The step's tensors; `update` has been called with this batch."""
        rows_S, first_S, counts_S = _ints(batch.rows_S), _ints(batch.first_S), _ints(batch.counts_S)
        starts_S1 = np.concatenate(([0], np.cumsum(counts_S)))
        rows_T = np.repeat(rows_S, counts_S)
        positions_T = np.arange(starts_S1[-1]) + np.repeat(first_S - starts_S1[:-1], counts_S)
        blocks_T = self.tables_RB[rows_T, positions_T // self.block_size].astype(np.int64)
        slots_T = blocks_T * self.block_size + positions_T % self.block_size
        slots_T[positions_T < self.num_stored_R[rows_T]] = -1
        context_S = first_S + counts_S
        width = -(-int(context_S.max(initial=0)) // self.block_size)
        rows, positions = self._send(rows_T), self._send(positions_T)
        advance_S = verified_U = None
        if any(batch.verifies_S):
            verifying_S = _ints(batch.verifies_S) > 0
            advance_S = torch.from_numpy(~verifying_S).to(self.device)
            verified_U = self._send(np.repeat(verifying_S, counts_S).nonzero()[0])
        return StepTensors(
            tokens_T=self.tokens_RL[rows, positions],
            rows_T=rows,
            positions_T=positions,
            cos_TR=cos_LR[positions],
            sin_TR=sin_LR[positions],
            slots_T=self._send(slots_T),
            tables_SB=torch.from_numpy(self.tables_RB[rows_S, :width]).to(self.device),
            query_start_S1=self._send(starts_S1),
            context_lens_S=self._send(context_S),
            state_slots_S=self._send(self.state_slots_R[rows_S]),
            fresh_S=self._send(first_S) == 0,
            lane_tokens=lane_tokens,
            advance_S=advance_S,
            segments=cut(batch, self.state_slots(batch.rows_S), self.device) if batch.save_rows else (),
            verified_U=verified_U,
        )

    def next_tokens(self, step: StepTensors) -> Tensor:
        """The token behind each of the step's positions, int64 [T]; all of them are known or drawn."""
        return self.tokens_RL[step.rows_T, step.positions_T + 1]

    def tokens_at(self, rows_N: list[int], positions_N: list[int]) -> Tensor:
        """Token ids int64 [N]."""
        return self.tokens_RL[self._send(_ints(rows_N)), self._send(_ints(positions_N))]

    def store(self, rows_N: list[int], positions_N: list[int], tokens_N: Tensor) -> None:
        """Write sampled tokens behind the rows' last positions; for NO_TOKEN one that can be embedded."""
        self.tokens_RL[self._send(_ints(rows_N)), self._send(_ints(positions_N))] = tokens_N.clamp_min(0)

    def prompt_spans(self, batch: StepBatch) -> list[PromptSpan]:
        """Computed prompt positions of rows that asked for prompt log probabilities and have a next prompt token."""
        spans: list[PromptSpan] = []
        end = 0
        for row, first, count in zip(batch.rows_S, batch.first_S, batch.counts_S, strict=True):
            begin, end = end, end + count
            num_top = self.samplings[row].prompt_logprobs
            known = min(count, self.prompt_lens[row] - 1 - first)
            if num_top is not None and known > 0:
                spans.append(PromptSpan(row=row, first_token=begin, first_position=first, count=known, num_top=num_top))
        return spans

    def _send(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def _ints(values: list[int]) -> Ints:
    return np.asarray(values, dtype=np.int64)
