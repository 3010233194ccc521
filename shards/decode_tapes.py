"""Decode steps on a CPU from tapes: a step of one token a row, its drafts verified and new ones made, is one call of
the compiled library instead of hundreds.

What a step computes depends on the rows, positions and counts that a tape reads, and its calls on the numbers of rows
and tokens, and on what is done behind the draws: for each kind that comes, a tape is recorded before its first step
runs. Where tokens are not simply the best ones, the host draws them between two tapes. A model that computes with
torch's own operators somewhere gets no tapes and runs as it is, as do steps with prompts, or several lanes.

To record takes some milliseconds of Python, nothing beside a step of a large model but ten steps of a very small one.
A model with a draft layer, which has many kinds of steps, has those of few rows recorded when it loads: nobody waits
then, and whoever tries drafts learns what they cost and not what their first step does.

S rows and T tokens of the step, C hidden size, V vocabulary held here.
"""

import ctypes
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, cast

from torch import Tensor

from shards.batch import StepBatch
from shards.cache import KvCache
from shards.decode_inputs import DecodeInputs, Rotary
from shards.kernels.native import NativeKernels
from shards.linear import Runtime
from shards.model import Model
from shards.mtp import Mtp
from shards.rows import Rows, StepTensors
from shards.shm import ShmComm
from shards.tape import Recorder, Tape, UnrecordableError, Workspace

logger = logging.getLogger(__name__)


_MOST_TAPES: Final = 256
"""A call of a tape takes 256 bytes, a step some 60 to 800 calls."""
_ROWS_AHEAD: Final = 4
"""Steps of so many rows are recorded when a model with drafts loads: those of more rows take longer themselves."""
_MOST_AHEAD: Final = 128
_MOST_UNEVEN: Final = 4096
"""Kinds that are remembered for having come once."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What makes steps differ in their calls."""

    rows: int
    tokens: int
    """More than rows: some verify drafts."""
    plain: bool
    keeps: bool
    """The draft layer's KV."""
    drafts: int
    """The most of any row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    """Two tapes, where tokens are chosen by the host between them, or one."""

    tapes: list[Tape]
    result: Tensor


class DecodeTapes:
    """The tapes of one model on one rank.

    Args:
        runtime: of native kernels, and groups that are local or in shared memory.
        draft_tokens: the most that a row drafts.
    """

    def __init__(
        self, model: Model, runtime: Runtime, cache: KvCache, rows: Rows, rotary: Rotary, draft_tokens: int
    ) -> None:
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
        self._model, self._cache = model, cache
        self._workspace = Workspace()
        self._inputs = DecodeInputs(self._recorder, rows, rotary, draft_tokens)
        self._most_rows, self._draft_tokens = len(rows.tables_RB), draft_tokens
        self._recorded: dict[_Kind, _Recorded] = {}
        self._kind = _Kind(0, 0, False, False, 0)
        """Of the step that `prepare` saw last."""
        self._uneven: set[tuple[int, int]] = set()
        """Numbers of rows and tokens of steps whose rows verify different numbers of drafts, which came before."""
        self._refused = False
        """This model has no tapes."""

    @property
    def is_plain(self) -> bool:
        """Whether the tokens of the step that `prepare` saw are the best ones."""
        return self._kind.plain

    def record_ahead(self) -> None:
        """Record what steps of few rows that keep, draft and verify come to, greedy and sampled."""
        for rows in range(1, min(self._most_rows, _ROWS_AHEAD) + 1):
            for kind in _kinds_ahead(rows, self._draft_tokens):
                if len(self._recorded) >= _MOST_AHEAD or not self._record(kind):
                    return

    def prepare(self, batch: StepBatch, *, plain: bool) -> bool:
        """Whether `run` can carry out the batch: every row draws a token behind each of its positions.

        Rows that verify different numbers of drafts make kinds without number, most of which come once: to record
        costs more than to run, so that is done with those that come again.

        Args:
            plain: tokens are the best ones.
        """
        rows = len(batch.rows_S)
        draws = rows + sum(batch.verifies_S)
        if not 0 < rows == sum(batch.samples_S) or sum(batch.counts_S) != draws or self._refused:
            return False
        if draws % rows and (rows, draws) not in self._uneven:
            if len(self._uneven) >= _MOST_UNEVEN:
                self._uneven.clear()
            self._uneven.add((rows, draws))
            return False
        keeps, drafts = self._model.mtp is not None and batch.keeps_mtp, max(batch.drafts_S, default=0)
        self._kind = _Kind(rows, draws, plain, keeps, drafts)
        return self._kind in self._recorded or self._record(self._kind)

    def run(self, batch: StepBatch) -> Tensor:
        """Compute a step's tokens -> where it is plain the best behind each, int64 [T], else logits [T, V].

        `prepare` has to be called before it, `follow` behind it. The result is valid until the next call.
        """
        self._inputs.take(batch)
        # Behind all others: what was not played for longest is given up for new ones.
        found = self._recorded[self._kind] = self._recorded.pop(self._kind)
        self._play(found.tapes[0])
        return found.result

    def follow(self, tokens_T: Tensor) -> list[int]:
        """Store the tokens drawn, keep and draft what the batch asks for -> how many draws of each row stay.

        Args:
            tokens_T: what is drawn behind each position, of a step that is not plain; else what `run` gave.
        """
        kind, inputs = self._kind, self._inputs
        if not kind.plain:
            inputs.drawn_T[: kind.tokens].copy_(tokens_T)
            self._play(self._recorded[kind].tapes[1])
        return inputs.kept(kind.rows) if kind.tokens > kind.rows else [1] * kind.rows

    def _record(self, kind: _Kind) -> bool:
        """Whether it could be done."""
        try:
            recorded = self._recording(kind)
        except UnrecordableError as error:
            logger.info("decode steps are not recorded: %s", error)
            self._refused = True
            return False
        if len(self._recorded) >= _MOST_TAPES:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[kind] = recorded
        return True

    def _recording(self, kind: _Kind) -> _Recorded:
        begun: list[tuple[StepTensors, Tensor]] = []

        def compute() -> Tensor:
            step, hidden_TC, result = self._compute(kind)
            begun.append((step, hidden_TC))
            if kind.plain:
                self._follow(kind, step, hidden_TC, result)
            return result

        result, tape = self._recorder.record(compute, self._workspace)
        tapes = [tape]
        if not kind.plain:
            step, hidden_TC = begun[0]
            drawn_T = self._inputs.drawn_T[: kind.tokens]
            _, follow = self._recorder.record(lambda: self._follow(kind, step, hidden_TC, drawn_T), self._workspace)
            tapes.append(follow)
        # Valid until the next call, so that all tapes can share the memory of their results.
        return _Recorded(tapes=tapes, result=Workspace.borrowed(result))

    def _compute(self, kind: _Kind) -> tuple[StepTensors, Tensor, Tensor]:
        """The step's tensors, hidden states and tokens, or logits."""
        with self._runtime.part("inputs"):
            step = self._inputs.fill(kind.rows, kind.tokens)
        hidden_TC = self._model.forward(self._runtime, step, self._cache)
        head = self._model.lm_head
        return step, hidden_TC, (head.best if kind.plain else head.part)(self._runtime, hidden_TC)

    def _follow(self, kind: _Kind, step: StepTensors, hidden_TC: Tensor, drawn_T: Tensor) -> Tensor:
        """What comes behind the draws, as Rank and Drafter do it -> the token behind each position, int64 [T]."""
        inputs, runtime = self._inputs, self._runtime
        with runtime.part("sampling"):
            next_T = inputs.accept(kind.rows, drawn_T)
        if step.delta_inputs:
            self._model.replay(runtime, step, inputs.replay(step), self._cache)
        if self._model.mtp is not None and (kind.keeps or kind.drafts):
            with runtime.part("drafts"):
                self._draft(self._model.mtp, kind, step, hidden_TC, next_T)
        return next_T

    def _draft(self, mtp: Mtp, kind: _Kind, step: StepTensors, hidden_TC: Tensor, next_T: Tensor) -> None:
        inputs, runtime, model = self._inputs, self._runtime, self._model
        pools = self._cache.k_pools[-1], self._cache.v_pools[-1]
        if kind.keeps:
            mtp.store_kv(runtime, model.embed_tokens.embed(runtime, next_T), hidden_TC, step, *pools)
        if not kind.drafts:
            return
        hidden_SC = runtime.kernels.embed(hidden_TC, inputs.last_S[: kind.rows])
        for depth in range(kind.drafts):
            draft = inputs.draft(kind.rows, depth)
            embedded_SC = model.embed_tokens.embed(runtime, draft.next_S)
            hidden_SC = mtp.forward(runtime, embedded_SC, hidden_SC, draft.step, *pools)
            inputs.store_drafts(kind.rows, depth, model.lm_head.best(runtime, hidden_SC))

    def _play(self, tape: Tape) -> None:
        profile = self._runtime.profile
        if self._comm is not None:
            self._comm.play(tape, timed=profile is not None)
        else:
            failed = tape.play(timed=profile is not None)
            assert failed is None, failed
        if profile is not None:
            profile.add_calls(tape.labels, tape.ns)


def _kinds_ahead(rows: int, draft_tokens: int) -> Iterator[_Kind]:
    """Of this many rows that all draft alike: before drafts, the first ones, as many once more, and behind the last."""
    for plain in (True, False):
        for keeps in (True, False):
            yield _Kind(rows, rows, plain, keeps, 0)
        for drafts in range(1, draft_tokens + 1):
            tokens = rows * (1 + drafts)
            yield _Kind(rows, rows, plain, True, drafts)
            yield _Kind(rows, tokens, plain, True, drafts)
            yield _Kind(rows, tokens, plain, True, 0)
            yield _Kind(rows, tokens, plain, False, 0)
