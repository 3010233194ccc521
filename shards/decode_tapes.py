"""Decode steps on a CPU from tapes: a step of one token a row is one call of the compiled library, instead of hundreds.

What a step computes depends on the rows and positions that a tape reads, and its calls on the number of rows alone: for
each number that comes, a tape is recorded while its first step runs. A model that computes with torch's own operators
somewhere gets no tapes and runs as it is, as do steps with longer rows, drafts, or several lanes.

S rows of the step, L positions a row can hold, B blocks a row can hold, V vocabulary held here.
"""

import ctypes
import dataclasses
import logging
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from shards.batch import StepBatch
from shards.cache import KvCache
from shards.kernels.native import NativeKernels
from shards.linear import Runtime
from shards.model import Model
from shards.rows import Rows, StepTensors
from shards.shm import ShmComm
from shards.tape import Numbers, Recorder, Tape, Workspace

logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines float32 [L, R]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    tape: Tape
    result: Tensor


class DecodeTapes:
    """The tapes of one model on one rank.

    Args:
        runtime: of native kernels, and groups that are local or in shared memory.
    """

    def __init__(self, model: Model, runtime: Runtime, cache: KvCache, rows: Rows, rotary: Rotary) -> None:
        profile = runtime.profile
        kernels, comm = runtime.kernels, runtime.comms.tp
        assert isinstance(kernels, NativeKernels)
        self._recorder = Recorder(kernels.library, tuple if profile is None else lambda: profile.path)
        kernels = kernels.through(cast("ctypes.CDLL", self._recorder))
        comms = runtime.comms
        if profile is not None:
            kernels, comms = profile.timed_kernels(kernels), profile.timed_comms(comms)
        self._runtime = dataclasses.replace(runtime, kernels=kernels, comms=comms)
        self._comm = comm if isinstance(comm, ShmComm) else None
        if self._comm is not None:
            self._comm.go_through(self._recorder)
        self._model, self._cache, self._rows = model, cache, rows
        self._rotary = rotary
        self._workspace = Workspace()
        self._inputs = _Inputs(rows, rotary)
        self._recorded: dict[tuple[int, bool], _Recorded] = {}
        self._refused = ""
        """Why this model has no tapes."""

    def takes(self, batch: StepBatch) -> bool:
        """Whether `run` can carry out the batch: every row computes and samples one token, and drafts none."""
        rows = len(batch.rows_S)
        simple = sum(batch.counts_S) == rows == sum(batch.samples_S)
        return simple and rows > 0 and not self._refused and not any(batch.drafts_S) and not any(batch.verifies_S)

    def run(self, batch: StepBatch, *, plain: bool) -> Tensor:
        """Compute a step -> with `plain` the rows' best tokens int64 [S], written behind them, or logits [S, V].

        The result is valid until the next call.
        """
        self._inputs.take(batch)
        key = (len(batch.rows_S), plain)
        found = self._recorded.get(key)
        if found is not None:
            self._play(found.tape)
            return found.result
        result, tape, problem = self._recorder.record(lambda: self._compute(*key), self._workspace)
        if tape is not None:
            # Valid until the next call, so that all tapes can share the memory of their results.
            self._recorded[key] = _Recorded(tape=tape, result=Workspace.borrowed(result))
        else:
            logger.info("decode steps are not recorded: %s", problem)
            self._refused = problem
        return result

    def _compute(self, rows: int, plain: bool) -> Tensor:
        inputs, library = self._inputs, self._recorder
        with self._runtime.part("inputs"):
            step = inputs.fill(library, rows, self._rows, self._rotary)
        hidden_SC = self._model.forward(self._runtime, step, self._cache)
        if not plain:
            return self._model.lm_head.part(self._runtime, hidden_SC)
        tokens_S = self._model.lm_head.best(self._runtime, hidden_SC)
        with self._runtime.part("sampling"):
            inputs.store(library, rows, self._rows, tokens_S)
        return tokens_S

    def _play(self, tape: Tape) -> None:
        profile = self._runtime.profile
        if self._comm is not None:
            self._comm.play(tape, timed=profile is not None)
        else:
            failed = tape.play(timed=profile is not None)
            assert failed is None, failed
        if profile is not None:
            profile.add_calls(tape.labels, tape.ns)


class _Inputs:
    """What tapes read of a step: which rows, and from which position on; and the tensors that they make of it."""

    def __init__(self, rows: Rows, rotary: Rotary) -> None:
        most, blocks = rows.tables_RB.shape
        self._rows_S: Numbers = np.zeros(most, dtype=np.int64)
        self._first_S: Numbers = np.zeros(most, dtype=np.int64)
        places = torch.zeros(6, most, dtype=torch.int64)
        self._rows_T, self._first_T = torch.from_numpy(self._rows_S), torch.from_numpy(self._first_S)
        self._tokens_T, self._slots_T, self._contexts_S, self._state_slots_S = places[:4].unbind(0)
        self._cos_TR, self._sin_TR = torch.zeros(2, most, rotary[0].shape[1]).unbind(0)
        self._tables_SB = torch.zeros(most, blocks, dtype=torch.int32)
        self._query_start_S1 = torch.arange(most + 1)
        self._fresh_S = torch.zeros(most, dtype=torch.bool)

    def take(self, batch: StepBatch) -> None:
        """The rows and positions of the next step."""
        count = len(batch.rows_S)
        self._rows_S[:count] = batch.rows_S
        self._first_S[:count] = batch.first_S

    def fill(self, library: Recorder, count: int, rows: Rows, rotary: Rotary) -> StepTensors:
        """The step's tensors, which later calls of the library fill anew."""
        cos_LR, sin_LR = rotary
        library.kernels_decode_inputs(
            self._rows_S.ctypes.data, self._first_S.ctypes.data, rows.tokens_RL.data_ptr(), rows.tables_RB.ctypes.data,
            rows.num_stored_R.ctypes.data, rows.state_slots_R.ctypes.data, cos_LR.data_ptr(), sin_LR.data_ptr(),
            self._tokens_T.data_ptr(), self._cos_TR.data_ptr(), self._sin_TR.data_ptr(), self._slots_T.data_ptr(),
            self._tables_SB.data_ptr(), self._contexts_S.data_ptr(), self._state_slots_S.data_ptr(),
            self._fresh_S.data_ptr(), count, rows.tokens_RL.shape[1], rows.tables_RB.shape[1], cos_LR.shape[1],
            rows.block_size,
        )  # fmt: skip
        return StepTensors(
            tokens_T=self._tokens_T[:count],
            rows_T=self._rows_T[:count],
            positions_T=self._first_T[:count],
            cos_TR=self._cos_TR[:count],
            sin_TR=self._sin_TR[:count],
            slots_T=self._slots_T[:count],
            tables_SB=self._tables_SB[:count],
            query_start_S1=self._query_start_S1[: count + 1],
            context_lens_S=self._contexts_S[:count],
            state_slots_S=self._state_slots_S[:count],
            fresh_S=self._fresh_S[:count],
            lane_tokens=(count,),
        )

    def store(self, library: Recorder, count: int, rows: Rows, tokens_S: Tensor) -> None:
        """As `Rows.store`, behind the rows' positions."""
        library.kernels_store_tokens(
            self._rows_S.ctypes.data, self._first_S.ctypes.data, tokens_S.data_ptr(), rows.tokens_RL.data_ptr(), count,
            rows.tokens_RL.shape[1],
        )  # fmt: skip
