"""Decode steps as CUDA graphs: a step of one token a row costs one launch instead of hundreds.

A graph has fixed shapes and addresses, so steps are padded: S rows to one of a few numbers, block tables to a power of
two. A row that pads has no key (context 0), stores none (slot -1) and leaves its recurrent state as it is. A step with
longer rows, drafts to verify or states to keep in the middle runs as it is, as do ranks in groups, whose exchange of
tokens waits for the host, and steps whose capture failed, which is told.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shards.rows import StepTensors

_LOG = logging.getLogger(__name__)

_FEWEST_BLOCKS = 16
_ROWS_APART = 8
"""Numbers of rows are 1, 2, 4 and then multiples of this."""
_MOST_FAILURES = 3
"""Captures that fail before no more are tried: what another thread does meanwhile can spoil one."""

Forward = Callable[[StepTensors], Tensor]


class Recorder(Protocol):
    """Records what a function has a device do."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What carries it out again, and the result, which is written anew each time.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        ...


class CudaRecorder:
    """CUDA graphs of the current device, which share memory: one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """As `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # torch leaves its own stream the current one when a capture fails in its end. Threads that serve or pull KV
        # meanwhile may call what the capturing thread may not.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = run()
        return graph.replay, result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    replay: Callable[[], None]
    step: StepTensors
    """What the graph reads."""
    hidden_TC: Tensor
    """What it writes."""


class DecodeGraphs:
    """The graphs of one model on one device; each is captured when a step first needs it.

    Args:
        forward: `Model.forward` but for what stays the same.
        recorder: makes the graphs.
    """

    def __init__(self, forward: Forward, recorder: Recorder) -> None:
        self._forward = forward
        self._recorder = recorder
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._failures = 0

    def forward(self, step: StepTensors) -> Tensor:
        """`Model.forward`; the result is valid until the next call."""
        captured = self._find(step) if can_replay(step) else None
        if captured is None:
            return self._forward(step)
        fill(captured.step, step)
        captured.replay()
        return captured.hidden_TC[: step.tokens_T.shape[0]]

    def _find(self, step: StepTensors) -> _Captured | None:
        """The graph that the step fits in; None where it cannot be captured."""
        rows, blocks = step.tables_SB.shape
        size = padded_rows(rows), padded_blocks(blocks)
        if size not in self._captured and self._failures < _MOST_FAILURES:
            try:
                self._captured[size] = self._capture(
                    padding_step(*size, rotary_dim=step.cos_TR.shape[1], device=step.tokens_T.device)
                )
            except RuntimeError as error:
                self._failures += 1
                then = "no more graphs are made" if self._failures == _MOST_FAILURES else "the next one is tried"
                _LOG.warning("decode of %d rows runs without a CUDA graph, slower; %s: %s", rows, then, error)
        return self._captured.get(size)

    def _capture(self, step: StepTensors) -> _Captured:
        # Kernels are compiled and libraries set up in a run before, which changes nothing: all of its rows pad.
        expected_TC = self._forward(step).clone()
        replay, hidden_TC = self._recorder.record(lambda: self._forward(step))
        replay()
        if not torch.equal(hidden_TC.view(torch.uint8), expected_TC.view(torch.uint8)):
            raise RuntimeError("its replay does not give what the step gave before it was captured")
        return _Captured(replay=replay, step=step, hidden_TC=hidden_TC)


def can_replay(step: StepTensors) -> bool:
    """Whether every row has one token, and nothing is done with it that a graph does not do."""
    rows = step.context_lens_S.shape[0]
    return 0 < rows == step.tokens_T.shape[0] and step.verified_U is None and not step.segments


def padded_rows(rows: int) -> int:
    """The number of rows of the graph for `rows` rows."""
    if rows <= _ROWS_APART:
        return 1 << (rows - 1).bit_length()
    return -(-rows // _ROWS_APART) * _ROWS_APART


def padded_blocks(blocks: int) -> int:
    """The width of block tables of the graph for tables `blocks` wide."""
    return max(_FEWEST_BLOCKS, 1 << (blocks - 1).bit_length())


def padding_step(
    rows: int, blocks: int, *, rotary_dim: int, device: torch.device, count: int = 1, lanes: int = 1
) -> StepTensors:
    """A step of which every row pads.

    Args:
        rows: S.
        blocks: width of the block tables.
        rotary_dim: R.
        device: where it lies.
        count: tokens of a row.
        lanes: that have as many tokens each.
    """

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    tokens = rows * count
    return StepTensors(
        tokens_T=zeros(tokens),
        rows_T=zeros(tokens),
        positions_T=zeros(tokens),
        cos_TR=zeros(tokens, rotary_dim, dtype=torch.float32),
        sin_TR=zeros(tokens, rotary_dim, dtype=torch.float32),
        slots_T=zeros(tokens) - 1,
        tables_SB=zeros(rows, blocks, dtype=torch.int32),
        query_start_S1=torch.arange(0, tokens + 1, count, device=device),
        context_lens_S=zeros(rows),
        state_slots_S=zeros(rows),
        fresh_S=torch.ones(rows, dtype=torch.bool, device=device),
        lane_tokens=(tokens,) * lanes,
        advance_S=zeros(rows, dtype=torch.bool),
    )


def fill(target: StepTensors, step: StepTensors) -> None:
    """Copy a step that `can_replay` into the first rows of a larger one; the rows behind pad."""
    rows, blocks = step.tables_SB.shape
    assert target.advance_S is not None
    target.tokens_T[:rows].copy_(step.tokens_T)
    target.cos_TR[:rows].copy_(step.cos_TR)
    target.sin_TR[:rows].copy_(step.sin_TR)
    target.slots_T[:rows].copy_(step.slots_T)
    target.tables_SB[:rows, :blocks].copy_(step.tables_SB)
    target.context_lens_S[:rows].copy_(step.context_lens_S)
    target.state_slots_S[:rows].copy_(step.state_slots_S)
    target.fresh_S[:rows].copy_(step.fresh_S)
    target.advance_S[:rows].fill_(True)
    target.slots_T[rows:].fill_(-1)
    target.context_lens_S[rows:].fill_(0)
    target.fresh_S[rows:].fill_(True)
    target.advance_S[rows:].fill_(False)
