"""Which drafts of a step are accepted, and what follows from it for recurrent state.

N draws of the step (one behind every position whose next token is chosen), S rows that verify drafts, U their tokens, K
those of them that stay.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from shards.batch import LaneOutput, LogprobColumns, StepBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The tokens that a step draws, sampled row by sampled row."""

    rows: list[int]
    """Sampled rows."""
    counts: list[int]
    """Draws of each: one more than its drafts."""
    rows_N: list[int]
    positions_N: list[int]
    """Position of the token drawn."""
    tokens_N: list[int]
    """Index, in the step's tokens, of the position before it."""
    drafts: list[int]
    """Tokens to draft behind each sampled row."""

    @staticmethod
    def of(batch: StepBatch) -> "Draws":
        """What `batch` asks for."""
        none, ones = [0] * len(batch.rows_S), [1] * len(batch.rows_S)
        if batch.counts_S == ones == batch.samples_S and not any(batch.verifies_S):
            # No loop: this is each plain decode step.
            return Draws(
                rows=batch.rows_S,
                counts=ones,
                rows_N=batch.rows_S,
                positions_N=list(map(add, batch.first_S, ones)),
                tokens_N=list(range(len(ones))),
                drafts=batch.drafts_S or none,
            )
        draws = Draws(rows=[], counts=[], rows_N=[], positions_N=[], tokens_N=[], drafts=[])
        columns = (batch.rows_S, batch.first_S, batch.counts_S, batch.samples_S)
        more = (batch.verifies_S or none, batch.drafts_S or none)
        end = 0
        for row, first, count, samples, verifies, drafts in zip(*columns, *more, strict=True):
            end += count
            if not samples:
                continue
            draws.rows.append(row)
            draws.counts.append(verifies + 1)
            draws.drafts.append(drafts)
            draws.rows_N.extend([row] * (verifies + 1))
            draws.positions_N.extend(range(first + count - verifies, first + count + 1))
            draws.tokens_N.extend(range(end - verifies - 1, end))
        return draws

    def accept(self, drawn_N: list[int], drafted_N: list[int]) -> list[int]:
        """How many of each sampled row's draws stay: accepted drafts, and the draw behind the last of them.

        Args:
            drawn_N: the draws; NO_TOKEN equals no draft.
            drafted_N: what stood at those positions before, a draft but for each row's last.
        """
        kept: list[int] = []
        end = 0
        for count in self.counts:
            begin, end = end, end + count
            agree = (drawn_N[i] == drafted_N[i] for i in range(begin, end - 1))
            kept.append(sum(itertools.takewhile(bool, agree)) + 1)
        return kept

    def answer(self, drawn_N: list[int], kept: list[int], logprobs: LogprobColumns | None) -> LaneOutput:
        """What the lane answers where `kept` of each row's draws stay."""
        if len(self.rows_N) == len(self.rows):
            return LaneOutput(rows_N=self.rows, tokens_N=drawn_N, logprobs=logprobs)
        starts = itertools.accumulate(self.counts, initial=0)
        stay = [start + i for start, count in zip(starts, kept, strict=False) for i in range(count)]
        return LaneOutput(
            rows_N=self.rows,
            tokens_N=[drawn_N[i] for i in stay],
            counts_N=kept,
            logprobs=None if logprobs is None else _pick(logprobs, stay),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The tokens over which the recurrent states of rows that verified drafts advance."""

    take: Callable[[Tensor], Tensor]
    """Of rows of the U tokens, those of the tokens that stay; what is behind them, if anything, is not used."""
    query_start_S1: Tensor
    state_slots_S: Tensor
    fresh_S: Tensor
    """bool: none."""

    @staticmethod
    def of(draws: Draws, kept: list[int], advance_S: Tensor, state_slots_S: Tensor) -> "Replay":
        """Rows that verify compute nothing but what they verify, so that their tokens are their draws."""
        pairs = [(count, stay) for count, stay in zip(draws.counts, kept, strict=True) if count > 1]
        starts = itertools.accumulate((count for count, _ in pairs), initial=0)
        tokens = [start + i for start, (_, stay) in zip(starts, pairs, strict=False) for i in range(stay)]
        ends = list(itertools.accumulate((stay for _, stay in pairs), initial=0))
        device = state_slots_S.device
        kept_K, slots_S = torch.tensor(tokens, device=device), state_slots_S[~advance_S]
        return Replay(
            take=lambda rows_U: rows_U[kept_K],
            query_start_S1=torch.tensor(ends, device=device),
            state_slots_S=slots_S,
            fresh_S=torch.zeros_like(slots_S, dtype=torch.bool),
        )


def _pick(columns: LogprobColumns, kept_draws: list[int]) -> LogprobColumns:
    """The columns' entries of the draws that stay."""
    return LogprobColumns(
        logprobs_N=[columns.logprobs_N[i] for i in kept_draws],
        ranks_N=[columns.ranks_N[i] for i in kept_draws],
        top_ids_NK=[columns.top_ids_NK[i] for i in kept_draws],
        top_logprobs_NK=[columns.top_logprobs_NK[i] for i in kept_draws],
    )
