"""Sequences that decode side by side, one token each a step: their part of a plan and of its results as columns.

Nothing is done row by row but for those that fill a block, end, or tell more than the next token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import eq, sub
from typing import NamedTuple

from cluster.sequence import Sequence
from router.request import TokenColumns
from shards.batch import NO_TOKEN

Saves = tuple[tuple[int, int], ...]
"""(position, slot): the slot gets the state behind that many positions, all drafts among them."""


class Work(NamedTuple):
    """What a plan asks of one sequence, remembered until the plan is committed.

    A tuple: one is made a row and step, and a frozen dataclass takes three times as long.
    """

    seq: Sequence
    row: int
    end: int
    """First position behind the computed ones; behind those before the drafts where it verifies some."""
    samples: bool
    verifies: int = 0
    """Drafts among what it computes, behind `end`."""
    saves: Saves = ()


def decoding(seqs: Iterable[Sequence]) -> list[Sequence]:
    """Those whose next step computes their last token (and drafts behind it) and samples."""
    # Asked of every row in every step, so what `remaining` and `all_sampled` say stands here once more.
    return [
        seq for seq in seqs if seq.length - seq.computed == 1 and seq.length < seq.last_len and seq.phase == "running"
    ]


class DecodeRun:
    """Sequences that decode, and what stays the same of them from step to step while none comes or goes."""

    def __init__(self, seqs: list[Sequence], rows_S: list[int]) -> None:
        self.seqs = seqs
        self.rows_S = rows_S
        self.ones_S = [1] * len(seqs)
        self.zeros_S = [0] * len(seqs)
        self.ends = frozenset((NO_TOKEN,)).union(*(seq.request.sampling.stop_token_ids for seq in seqs))
        """Tokens behind which some of them may end."""
        self._last_S = [seq.last_len - 2 for seq in seqs]
        """The position behind which each samples its last token."""
        self._wordy = {i for i, seq in enumerate(seqs) if seq.request.sampling.logprobs is not None}
        """Rows that tell log probabilities with each token."""
        self._terse = [i for i in range(len(seqs)) if i not in self._wordy]
        self._request_ids = [seq.request.id for seq in seqs]
        self._terse_ids = [seqs[i].request.id for i in self._terse]
        self._before_S = [seq.prompt_len - 1 for seq in seqs]
        self._all_told = False
        """Each has had its first token here."""

    def is_of(self, seqs: list[Sequence], rows_S: list[int]) -> bool:
        """Whether these are they, in the rows where they were."""
        return self.rows_S == rows_S and self.seqs == seqs

    def advance(self) -> list[int]:
        """Plan the next token of each -> the positions that are computed for it."""
        first_S = [seq.computed for seq in self.seqs]
        for seq in self.seqs:
            seq.computed += 1
            seq.length += 1
            seq.drafts_ready = 0
        return first_S

    def singled_out(self, first_S: list[int], tokens_S: list[int]) -> set[int]:
        """Rows of which there is more to tell than these tokens: their first ones here, ends, log probabilities."""
        found = {i for i, seq in enumerate(self.seqs) if seq.phase != "running"}
        found.update(self._wordy)
        if any(map(eq, first_S, self._last_S)):
            found.update(i for i, (first, last) in enumerate(zip(first_S, self._last_S, strict=True)) if first == last)
        if not self._all_told:
            untold = [i for i, seq in enumerate(self.seqs) if not seq.told]
            self._all_told = not untold
            found.update(untold)
        if not self.ends.isdisjoint(tokens_S):
            found.update(i for i, token in enumerate(tokens_S) if token in self.ends)
        return found

    def take(self, first_S: list[int], tokens_S: list[int], *, but: set[int]) -> TokenColumns:
        """Commit a token of each but some, and tell it."""
        request_ids, index_S = self._request_ids, list(map(sub, first_S, self._before_S))
        seqs = self.seqs
        if but:
            kept, request_ids = self._terse, self._terse_ids
            if but != self._wordy:
                kept = [i for i in range(len(seqs)) if i not in but]
                request_ids = [self._request_ids[i] for i in kept]
            seqs = [seqs[i] for i in kept]
            tokens_S, index_S = [tokens_S[i] for i in kept], [index_S[i] for i in kept]
        for seq, token in zip(seqs, tokens_S, strict=True):
            seq.tokens.append(token)
        return TokenColumns(request_ids=request_ids, indices=index_S, token_ids=tokens_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """One step of a run, remembered until its commit. Row i computes position first_S[i] and samples behind it."""

    run: DecodeRun
    first_S: list[int]
    filled: dict[int, Saves]
    """Rows that fill a block, or whose state is kept, with the states kept."""

    def work(self, index: int) -> Work:
        """One row's part."""
        run = self.run
        return Work(run.seqs[index], run.rows_S[index], self.first_S[index] + 1, True, saves=self.filled.get(index, ()))
