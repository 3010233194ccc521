"""What tapes of decode steps read of a step, and the tensors that the library makes of it: each has its place for good.

S rows and T tokens of the step, L positions a row can hold, R in cos_TR is the rotary dim, N columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.batch import StepBatch
from shards.rows import Rows, StepTensors
from shards.tape import Numbers, Recorder
from shards.verify import Replay

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines float32 [L, R]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStep:
    """A step of the draft layer, one position a row."""

    next_S: Tensor
    """int64: the token behind each position."""
    step: StepTensors


class DecodeInputs:
    """Room for steps of all rows, with up to so many drafts each.

    Args:
        library: what calls go through.
    """

    def __init__(self, library: Recorder, rows: Rows, rotary: Rotary, draft_tokens: int) -> None:
        self._library, self._rows, self._rotary = library, rows, rotary
        most, blocks = rows.tables_RB.shape
        tokens, self._dim = most * (1 + draft_tokens), rotary[0].shape[1]
        self._rows_S: Numbers = np.zeros(most, dtype=np.int64)
        self._first_S, self._counts_S, self._drafts_S = (np.zeros_like(self._rows_S) for _ in range(3))
        self._rows_T, self._first_T = torch.from_numpy(self._rows_S), torch.from_numpy(self._first_S)
        self.drawn_T, self._next_T, self._tokens_T, self._slots_T = _whole(4, tokens)
        self._contexts_S, self._state_slots_S, self._kept_S, self.last_S, self._next_S, self._draft_slots_S = _whole(
            6, most
        )
        self._draft_contexts_S = self._contexts_S.clone()
        self._kept_numbers_S: Numbers = self._kept_S.numpy()
        self._starts_S1, self._replay_S1 = _whole(2, most + 1)
        self._one_each_S1 = torch.arange(most + 1)
        self._cos_TR, self._sin_TR = torch.zeros(2, tokens, self._dim).unbind(0)
        self._draft_cos_SR, self._draft_sin_SR = torch.zeros(2, most, self._dim).unbind(0)
        self._tables_SB, self._draft_tables_SB = torch.zeros(2, most, blocks, dtype=torch.int32).unbind(0)
        self._fresh_S, self._advance_S, self._not_fresh_S = torch.zeros(3, most, dtype=torch.bool).unbind(0)

    def take(self, batch: StepBatch) -> None:
        """The rows, positions and drafts of the next step."""
        count = len(batch.rows_S)
        self._rows_S[:count] = batch.rows_S
        self._first_S[:count] = batch.first_S
        self._counts_S[:count] = batch.counts_S if any(batch.verifies_S) else 1
        self._drafts_S[:count] = batch.drafts_S or 0

    def fill(self, count: int, tokens: int) -> StepTensors:
        """The step's tensors, which later calls of the library fill anew.

        Args:
            count: rows.
            tokens: of all rows; as many as rows: none verifies drafts.
        """
        rows, (cos_LR, sin_LR) = self._rows, self._rotary
        self._library.kernels_decode_inputs(
            *self._addresses(self._rows_S, self._first_S, self._counts_S), *self._held(),
            rows.state_slots_R.ctypes.data, cos_LR.data_ptr(), sin_LR.data_ptr(), self._tokens_T.data_ptr(),
            self._cos_TR.data_ptr(), self._sin_TR.data_ptr(), self._slots_T.data_ptr(), self._tables_SB.data_ptr(),
            self._starts_S1.data_ptr(), self._contexts_S.data_ptr(), self._state_slots_S.data_ptr(),
            self._fresh_S.data_ptr(), self._advance_S.data_ptr(), count, *self._sizes(),
        )  # fmt: skip
        return StepTensors(
            tokens_T=self._tokens_T[:tokens],
            rows_T=self._rows_T[:count],
            positions_T=self._first_T[:count],
            cos_TR=self._cos_TR[:tokens],
            sin_TR=self._sin_TR[:tokens],
            slots_T=self._slots_T[:tokens],
            tables_SB=self._tables_SB[:count],
            query_start_S1=self._starts_S1[: count + 1],
            context_lens_S=self._contexts_S[:count],
            state_slots_S=self._state_slots_S[:count],
            fresh_S=self._fresh_S[:count],
            lane_tokens=(tokens,),
            advance_S=self._advance_S[:count] if tokens > count else None,
            verified_U=slice(None) if tokens > count else None,
        )

    def accept(self, count: int, drawn_T: Tensor) -> Tensor:
        """Store the draws and see which stay -> the token behind each position, int64 [T]."""
        self._library.kernels_accept(
            *self._addresses(self._rows_S, self._first_S, self._counts_S), drawn_T.data_ptr(),
            self._rows.tokens_RL.data_ptr(), self._kept_S.data_ptr(), self._next_T.data_ptr(), self.last_S.data_ptr(),
            self._replay_S1.data_ptr(), count, self._rows.tokens_RL.shape[1],
        )  # fmt: skip
        return self._next_T[: drawn_T.shape[0]]

    def kept(self, count: int) -> list[int]:
        """How many draws of each row stay, once `accept` has seen it."""
        return self._kept_numbers_S[:count].tolist()

    def replay(self, step: StepTensors) -> Replay:
        """The tokens that stay, once `accept` has seen which."""
        count = step.context_lens_S.shape[0]

        def take(x_TN: Tensor) -> Tensor:
            out_TN = torch.empty_like(x_TN)
            self._library.kernels_take_spans(
                x_TN.data_ptr(), self._starts_S1.data_ptr(), self._replay_S1.data_ptr(), out_TN.data_ptr(), count,
                x_TN.shape[1] * x_TN.dtype.itemsize,
            )  # fmt: skip
            return out_TN

        return Replay(
            take=take,
            query_start_S1=self._replay_S1[: count + 1],
            state_slots_S=step.state_slots_S,
            fresh_S=self._not_fresh_S[:count],
        )

    def draft(self, count: int, depth: int) -> DraftStep:
        """As `fill`, for the depth'th draft of each row (0 is the first)."""
        cos_LR, sin_LR = self._rotary
        self._library.kernels_draft_inputs(
            *self._addresses(self._rows_S, self._first_S), self._kept_S.data_ptr(), self._drafts_S.ctypes.data,
            *self._held(), cos_LR.data_ptr(), sin_LR.data_ptr(), self._next_S.data_ptr(),
            self._draft_cos_SR.data_ptr(), self._draft_sin_SR.data_ptr(), self._draft_slots_S.data_ptr(),
            self._draft_tables_SB.data_ptr(), self._draft_contexts_S.data_ptr(), count, *self._sizes(), depth,
        )  # fmt: skip
        step = StepTensors(
            tokens_T=self._next_S[:count],
            rows_T=self._rows_T[:count],
            positions_T=self._first_T[:count],
            cos_TR=self._draft_cos_SR[:count],
            sin_TR=self._draft_sin_SR[:count],
            slots_T=self._draft_slots_S[:count],
            tables_SB=self._draft_tables_SB[:count],
            query_start_S1=self._one_each_S1[: count + 1],
            context_lens_S=self._draft_contexts_S[:count],
            state_slots_S=self._state_slots_S[:count],
            fresh_S=self._not_fresh_S[:count],
            lane_tokens=(count,),
        )
        return DraftStep(next_S=self._next_S[:count], step=step)

    def store_drafts(self, count: int, depth: int, drafts_S: Tensor) -> None:
        """What rows that draft so far have drafted."""
        self._library.kernels_store_drafts(
            *self._addresses(self._rows_S, self._first_S), self._kept_S.data_ptr(), self._drafts_S.ctypes.data,
            drafts_S.data_ptr(), self._rows.tokens_RL.data_ptr(), count, self._rows.tokens_RL.shape[1], depth,
        )  # fmt: skip

    def _held(self) -> tuple[int, int, int]:
        """The tokens, tables and stored positions of all rows."""
        rows = self._rows
        return rows.tokens_RL.data_ptr(), rows.tables_RB.ctypes.data, rows.num_stored_R.ctypes.data

    def _sizes(self) -> tuple[int, int, int, int]:
        rows = self._rows
        return rows.tokens_RL.shape[1], rows.tables_RB.shape[1], self._dim, rows.block_size

    @staticmethod
    def _addresses(*numbers: Numbers) -> list[int]:
        return [piece.ctypes.data for piece in numbers]


def _whole(count: int, size: int) -> tuple[Tensor, ...]:
    """Tensors of int64 zeros."""
    return torch.zeros(count, size, dtype=torch.int64).unbind(0)
