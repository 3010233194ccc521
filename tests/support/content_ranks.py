"""Ranks that keep the content of every block and state slot, and complain when it is not what it should be."""

from dataclasses import dataclass, field, replace
from hashlib import blake2b

from shards.batch import LaneOutput, LogprobColumns, StepBatch

VOCAB = 53
BLOCK = 4


def digest(tokens: tuple[int, ...]) -> int:
    """What the KV of the last of these tokens depends on: all of them."""
    return int.from_bytes(blake2b(repr(tokens).encode(), digest_size=7).digest())


def next_token(tokens: tuple[int, ...]) -> int:
    return digest(tokens) % VOCAB


def some_right(tokens: tuple[int, ...], count: int) -> list[int]:
    """Drafts behind `tokens`, most of them right."""
    drafts: list[int] = []
    for _ in range(count):
        known = (*tokens, *drafts)
        wrong = digest((*known, -1)) % 4 == 0
        drafts.append((next_token(known) + wrong) % VOCAB)
    return drafts


@dataclass
class FakeRow:
    tokens: list[int]
    prompt_len: int
    blocks: list[int]
    num_stored: int
    slot: int
    wants_prompt: bool
    wants_logprobs: bool
    drafts: list[int] = field(default_factory=list)
    """Behind the last token; some are wrong."""


@dataclass
class FakeLane:
    """Ranks of one lane. kv[block, offset] is the digest of all tokens up to that position."""

    kv: dict[tuple[int, int], int] = field(default_factory=dict)
    states: dict[int, tuple[int, int]] = field(default_factory=dict)
    rows: dict[int, FakeRow] = field(default_factory=dict)
    kept: dict[int, tuple[int, int]] | None = None
    """Where kept states lie, if not in slots."""

    def run(self, batch: StepBatch) -> LaneOutput:
        for start in batch.starts:
            self.rows[start.row] = FakeRow(
                list(start.token_ids),
                start.prompt_len,
                list(start.blocks),
                start.num_stored,
                start.state_slot,
                start.sampling.prompt_logprobs is not None,
                start.sampling.logprobs is not None,
            )
        for source, target in zip(batch.restore_from, batch.restore_to, strict=True):
            assert self.kept is not None or target not in batch.restore_from
            self.states[target] = (self.states if self.kept is None else self.kept)[source]
        for row, block in zip(batch.grown_rows, batch.grown_blocks, strict=True):
            self.rows[row].blocks.append(block)
        output = LaneOutput()
        none = [0] * len(batch.rows_S)
        columns_S = batch.rows_S, batch.first_S, batch.counts_S, batch.samples_S
        more = batch.verifies_S or none, batch.drafts_S or none
        for row, first, count, samples, verifies, drafts in zip(*columns_S, *more, strict=True):
            self._advance(row, first, count, verifies, output)
            if samples:
                output.rows_N.append(row)
                output.counts_N.append(self._sample(self.rows[row], first + count, verifies, output))
            self._end(self.rows[row], first + count, verifies, drafts)
        if not batch.verifies_S:
            output.counts_N.clear()
        self._save(batch)
        if any(self.rows[row].wants_logprobs for row in output.rows_N):
            output = replace(output, logprobs=columns(output.tokens_N))
        return output

    def _advance(self, row: int, first: int, count: int, verifies: int, output: LaneOutput) -> None:
        held = self.rows[row]
        if verifies:
            del held.tokens[first + count - verifies :]
            held.tokens += held.drafts[:verifies]
        assert first + count <= len(held.tokens)
        self._compute(row, first, count, output)

    def _end(self, held: FakeRow, end: int, verifies: int, drafts: int) -> None:
        """State and drafts behind a row's step, of positions up to `end`."""
        # Blocks for all drafts but the last, behind the positions of this step.
        assert not drafts or end + drafts - 1 <= len(held.blocks) * BLOCK
        held.drafts = some_right(tuple(held.tokens), drafts)
        if held.slot >= 0:
            accepted = len(held.tokens) - 1 if verifies else end
            self.states[held.slot] = (accepted, digest(tuple(held.tokens[:accepted])))

    def _sample(self, held: FakeRow, end: int, verifies: int, output: LaneOutput) -> int:
        """Draw behind each position from that before the drafts on, up to the first wrong one -> how many."""
        drafts = held.tokens[end - verifies : end]
        del held.tokens[end - verifies :]
        for count, draft in enumerate([*drafts, -1], start=1):
            token = next_token(tuple(held.tokens))
            held.tokens.append(token)
            output.tokens_N.append(token)
            if token != draft:
                return count
        raise AssertionError("no token is -1")

    def _save(self, batch: StepBatch) -> None:
        spans = {
            row: range(first + 1, first + count + 1)
            for row, first, count in zip(batch.rows_S, batch.first_S, batch.counts_S, strict=True)
        }
        slots = {self.rows[row].slot for row in batch.rows_S}
        for row, end, target in zip(batch.save_rows, batch.save_ends, batch.save_to, strict=True):
            assert end in spans[row]
            assert self.kept is not None or target not in slots
            kept = self.states if self.kept is None else self.kept
            kept[target] = (end, digest(tuple(self.rows[row].tokens[:end])))

    def _compute(self, row: int, first: int, count: int, output: LaneOutput) -> None:
        held = self.rows[row]
        for position in range(first):
            place = held.blocks[position // BLOCK], position % BLOCK
            assert self.kv[place] == digest(tuple(held.tokens[: position + 1])), f"row {row} reads foreign KV"
        if held.slot >= 0:
            assert first == 0 or self.states[held.slot] == (first, digest(tuple(held.tokens[:first])))
        for position in range(first, first + count):
            place = held.blocks[position // BLOCK], position % BLOCK
            known = digest(tuple(held.tokens[: position + 1]))
            if position < held.num_stored:
                assert self.kv[place] == known, f"row {row} is told of KV that is not there"
            self.kv[place] = known
        if held.wants_prompt:
            output.prompt_logprobs[row] = columns(held.tokens[first + 1 : min(first + count + 1, held.prompt_len)])


def columns(tokens: list[int]) -> LogprobColumns:
    """Log probability -t for token t: easy to recognise."""
    return LogprobColumns(
        logprobs_N=[-float(token) for token in tokens],
        ranks_N=[1] * len(tokens),
        top_ids_NK=[[token, 0] for token in tokens],
        top_logprobs_NK=[[-float(token), 0.0] for token in tokens],
    )
