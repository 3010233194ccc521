"""A step cut where recurrent states are kept behind a row's middle: delta layers run it piece by piece.

S rows with tokens in a piece, K states kept behind it.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from shards.batch import StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of a step that lie side by side, and the states to copy when they are done."""

    first_token: int
    end_token: int
    state_slots_S: Tensor
    """int64, as are the other slots and starts."""
    query_start_S1: Tensor
    """First token of each row in the segment, counted from the segment's first."""
    fresh_S: Tensor
    """bool"""
    advance_S: Tensor | None
    """bool; None: all advance."""
    sources_K: Tensor
    targets_K: Tensor
    """Slot sources_K[i] is copied to the place targets_K[i] of kept states."""


def cut(batch: StepBatch, slots_S: list[int], device: torch.device) -> tuple[Segment, ...]:
    """The segments of a step with states to keep behind the middle of a row, none of a step without.

    Args:
        slots_S: state slots of the batch's rows.
    """
    starts = [0]
    for count in batch.counts_S:
        starts.append(starts[-1] + count)
    index_of = {row: index for index, row in enumerate(batch.rows_S)}
    copies: dict[int, list[tuple[int, int]]] = {}
    for row, end, target in zip(batch.save_rows, batch.save_ends, batch.save_to, strict=True):
        index = index_of[row]
        token = starts[index] + end - batch.first_S[index]
        if token < starts[index + 1]:
            copies.setdefault(token, []).append((slots_S[index], target))
    if not copies:
        return ()
    edges = sorted({0, *copies, starts[-1]})
    return tuple(_segment(batch, slots_S, starts, edge, copies.get(edge[1], []), device) for edge in pairwise(edges))


def _segment(
    batch: StepBatch,
    slots_S: list[int],
    starts: list[int],
    edge: tuple[int, int],
    copies: list[tuple[int, int]],
    device: torch.device,
) -> Segment:
    first, end = edge
    within = [index for index in range(len(slots_S)) if starts[index] < end and starts[index + 1] > first]
    begins = [max(starts[index], first) - first for index in within]
    fresh = [batch.first_S[index] == 0 and starts[index] >= first for index in within]
    advance = [not batch.verifies_S[index] for index in within] if any(batch.verifies_S) else None
    return Segment(
        first_token=first,
        end_token=end,
        state_slots_S=torch.tensor([slots_S[index] for index in within], device=device),
        query_start_S1=torch.tensor([*begins, end - first], device=device),
        fresh_S=torch.tensor(fresh, device=device),
        advance_S=None if advance is None else torch.tensor(advance, device=device),
        sources_K=torch.tensor([source for source, _ in copies], dtype=torch.int64, device=device),
        targets_K=torch.tensor([target for _, target in copies], dtype=torch.int64, device=device),
    )
