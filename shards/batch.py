"""What a step asks of the ranks of one data-parallel lane, and what they answer: plain columns, no torch.

A lane is one data-parallel rank: `tp` ranks that hold the same sequences. A row is a sequence's place on the
lane's ranks (0 .. max_rows-1); ranks keep each row's tokens, block table and sampling, so that a step names rows,
not tokens. S is the number of rows computed in the step.
"""

from dataclasses import dataclass, field

NO_TOKEN = -1
"""Stands in for the token of a row that cannot be sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How a row's next tokens are chosen; the fields mean what they mean in `router.request.SamplingParams`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Masked while fewer than `min_tokens` tokens were generated."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every token is that of the largest raw logit, and nothing else is asked of the logits."""
        touched = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        masked = self.min_tokens and self.stop_token_ids
        return self.temperature == 0 and not touched and not masked and self.logprobs is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStart:
    """A sequence takes a row (again, after a preemption or a hand-off)."""

    row: int
    token_ids: tuple[int, ...]
    """Prompt and output so far; position i of the sequence is token_ids[i]."""
    prompt_len: int
    """How many of them are the prompt (penalties and min_tokens count output only)."""
    blocks: tuple[int, ...]
    """Block table so far."""
    num_stored: int = 0
    """The KV of this many first positions is there and others may read it: it is not written again, even where these
    positions are computed once more."""
    state_slot: int = -1
    """Recurrent-state slot, -1 for models without."""
    sampling: RowSampling


# Not frozen: one is filled row by row for every step, and to make it again of its columns takes three times as long.
@dataclass(slots=True, kw_only=True)
class StepBatch:
    """One lane's part of a step. Never changed once given out; ranks carry batches out in the order they get them.

    Row i of the step computes positions first_S[i] .. first_S[i] + counts_S[i] - 1 of row rows_S[i]. Where
    samples_S[i] is 1 the rank samples the token behind the last computed position and stores it in the row, so that
    the next step can be planned before the token is known. A row whose first_S is 0 starts from zero recurrent state.

    With speculation the last verifies_S[i] of a row's positions hold drafts. The token behind each position is drawn,
    from that of the last position before the drafts on; drafts are accepted up to the first that differs from what
    was drawn in its place, and the row goes on behind the accepted ones only. Then the rank drafts drafts_S[i] tokens
    behind the last token of a sampled row; blocks for all but the last of them, behind the row's positions, are in
    its table, and the row has room for all of them. Both columns are empty where no row has any.
    """

    starts: tuple[RowStart, ...] = ()
    restore_from: list[int] = field(default_factory=list)
    restore_to: list[int] = field(default_factory=list)
    """Kept state restore_from[i] is copied to slot restore_to[i] before anything is computed. Kept states lie in slots
    (no slot is in both), or where they are int8 in places of their own."""
    grown_rows: list[int] = field(default_factory=list)
    grown_blocks: list[int] = field(default_factory=list)
    """Block grown_blocks[i] is appended to the table of row grown_rows[i] (after `starts`)."""
    rows_S: list[int] = field(default_factory=list)
    first_S: list[int] = field(default_factory=list)
    counts_S: list[int] = field(default_factory=list)
    samples_S: list[int] = field(default_factory=list)
    verifies_S: list[int] = field(default_factory=list)
    drafts_S: list[int] = field(default_factory=list)
    keeps_mtp: bool = True
    """False: nobody is about to draft, and the multi-token prediction layer's KV of these positions is left out. Drafts
    behind them are worse for it, and no token is another."""
    save_rows: list[int] = field(default_factory=list)
    save_ends: list[int] = field(default_factory=list)
    save_to: list[int] = field(default_factory=list)
    """The state of row save_rows[i] behind its first save_ends[i] positions, the last of which this step computes, is
    copied to the place save_to[i] of kept states, which is no row's slot. Rows that verify drafts keep none behind
    their middle."""

    @property
    def only_decodes(self) -> bool:
        """Whether each row computes one position and the drafts behind it."""
        return sum(self.counts_S) - sum(self.verifies_S) == len(self.rows_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobColumns:
    """Raw log probabilities of N positions: the chosen token's, its rank (1 is best), and up to K alternatives."""

    logprobs_N: list[float]
    ranks_N: list[int]
    top_ids_NK: list[list[int]]
    top_logprobs_NK: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOutput:
    """What a lane's first TP rank answers to one StepBatch.

    rows_N are the sampled rows in the batch's order. tokens_N are their tokens, one each, but with drafts counts_N[i]
    (accepted drafts and one more); counts_N is empty where every row has one. NO_TOKEN stands where logits were not
    finite, so that there is nothing to choose from: no token of the row follows it. `logprobs` has as many entries as
    tokens when any of the sampled rows asked for log probabilities. prompt_logprobs holds, by row, those of the
    prompt positions computed in this step, first position first (position p's entry is the log probability of token
    p + 1).
    """

    rows_N: list[int] = field(default_factory=list)
    tokens_N: list[int] = field(default_factory=list)
    counts_N: list[int] = field(default_factory=list)
    logprobs: LogprobColumns | None = None
    prompt_logprobs: dict[int, LogprobColumns] = field(default_factory=dict)
    compute_s: float = 0.0
    """Seconds the rank computed for this batch."""
