"""Decode steps as CUDA graphs: a step of one token a row costs one launch instead of hundreds.

A graph has fixed shapes and addresses, so steps are padded: S rows to one of a few numbers, block tables to a power of
two. A row that pads has no key (context 0), stores none (slot -1) and leaves its recurrent state as it is. A step with
longer rows, drafts to verify or states to keep in the middle runs as it is, as do ranks in groups, whose exchange of
tokens waits for the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shards.cache import KvCache
from shards.linear import Runtime
from shards.model import Model
from shards.rows import StepTensors

_FEWEST_BLOCKS = 16
_ROWS_APART = 8
"""Numbers of rows are 1, 2, 4 and then multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    step: StepTensors
    """What the graph reads."""
    hidden_TC: Tensor
    """What it writes."""


class DecodeGraphs:
    """The graphs of one model on one CUDA device; each is captured when a step first needs it."""

    def __init__(self, model: Model, runtime: Runtime, cache: KvCache) -> None:
        self._model = model
        self._runtime = runtime
        self._cache = cache
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def forward(self, step: StepTensors) -> Tensor:
        """`Model.forward`; the result is valid until the next call."""
        if not can_replay(step):
            return self._model.forward(self._runtime, step, self._cache)
        rows, blocks = step.tables_SB.shape
        size = padded_rows(rows), padded_blocks(blocks)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(padding_step(*size, step))
        fill(captured.step, step)
        captured.graph.replay()
        return captured.hidden_TC[:rows]

    def _capture(self, step: StepTensors) -> _Captured:
        # Kernels are compiled and libraries set up in a run before, which changes nothing: all of its rows pad.
        self._model.forward(self._runtime, step, self._cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden_TC = self._model.forward(self._runtime, step, self._cache)
        return _Captured(graph=graph, step=step, hidden_TC=hidden_TC)


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


def padding_step(rows: int, blocks: int, like: StepTensors) -> StepTensors:
    """A step of which every row pads, on the device of `like` and in its dtypes."""
    tokens, R = like.tokens_T, like.cos_TR.shape[1]
    return StepTensors(
        tokens_T=tokens.new_zeros(rows),
        rows_T=tokens.new_zeros(rows),
        positions_T=tokens.new_zeros(rows),
        cos_TR=like.cos_TR.new_zeros(rows, R),
        sin_TR=like.sin_TR.new_zeros(rows, R),
        slots_T=tokens.new_full((rows,), -1),
        tables_SB=like.tables_SB.new_zeros(rows, blocks),
        query_start_S1=torch.arange(rows + 1, device=tokens.device),
        context_lens_S=tokens.new_zeros(rows),
        state_slots_S=tokens.new_zeros(rows),
        fresh_S=torch.ones(rows, dtype=torch.bool, device=tokens.device),
        lane_tokens=(rows,),
        advance_S=torch.zeros(rows, dtype=torch.bool, device=tokens.device),
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
