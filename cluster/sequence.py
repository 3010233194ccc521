"""One member's running state of a request: tokens, what is computed of them, and the room it holds."""

import math
from dataclasses import dataclass
from typing import Literal

from cluster.plan import KvTicket
from router.prefix import extend_hashes
from router.request import FIRST_PRIORITY, FinishReason, Request, SamplingParams, TokenEvent, TokenLogprob
from shards.batch import LogprobColumns, RowSampling, RowStart

Mode = Literal["full", "prefill"]
Phase = Literal["waiting", "pulling", "running", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A claim on the first positions of a sequence that still runs. Its room stays until the offer is over."""

    ticket_id: str
    num_tokens: int
    expires_unix_s: float


class Sequence:
    """State with one writer, the scheduler. Positions count from the first prompt token.

    `tokens` are known; `length` counts those too that plans given out sample. `computed` counts positions whose KV such
    plans write, `settled` those whose plans are committed, but for the ones in a block that decoding has not filled.
    """

    def __init__(self, request: Request, *, mode: Mode, lane: int, order: tuple[int, int]) -> None:
        self.request = request
        self.mode: Mode = mode
        self.lane = lane
        self.order = order
        """Lower goes first: (-priority, arrival)."""
        self.phase: Phase = "waiting"
        self.ticket: KvTicket | None = None
        self.tokens = [*request.prompt_ids, *request.output_ids]
        self.prompt_len = len(request.prompt_ids)
        self.deadline = math.inf if request.deadline_unix_s is None else request.deadline_unix_s
        self.length = len(self.tokens)
        self.drafts_ready = 0
        """Drafts behind the last token that stand in its row on the ranks."""
        self.uncertain = False
        """A given-out plan verifies drafts of it: how many of its positions count is known when that is committed."""
        self.computed = 0
        self.settled = 0
        self.registered = 0
        """Blocks of the table that were offered to the prefix cache."""
        self.checkpoint_ends: list[int] = []
        """Positions still to come behind which the recurrent state is kept while known tokens are computed."""
        self.known_len = 0
        """Tokens known when it got its room; behind them it decodes."""
        self.newest_state: int | None = None
        """Hash of the last state kept while it decoded."""
        self.blocks: list[int] = []
        self.row = -1
        self.slot = -1
        self.cached_tokens = 0
        self.offer: Offer | None = None
        """What can be fetched of it while the rest of its prompt is computed."""
        self.awaits_pull = False
        """Blocks of it are being pulled that were offered before its ticket."""
        self.told = False
        """Its first token here went out."""
        self._hashes: list[int] = []
        self._prompt_logprobs: list[TokenLogprob | None] = []
        new_tokens = 1 if mode == "prefill" else request.sampling.max_tokens - len(request.output_ids)
        self.last_len = len(self.tokens) + new_tokens
        """Its tokens when it has all that it may have here."""

    def __str__(self) -> str:
        return (
            f"{self.request.id} {self.phase}: {len(self.tokens)} tokens, {self.pending} pending, "
            f"{self.computed} computed, {self.settled} settled"
        )

    @property
    def goes_first(self) -> bool:
        """Its first token is not to wait for others' prompts."""
        return self.request.priority >= FIRST_PRIORITY

    @property
    def num_output(self) -> int:
        """Tokens generated and known, by whichever member."""
        return len(self.tokens) - self.prompt_len

    @property
    def pending(self) -> int:
        """Tokens sampled by plans that are not committed."""
        return self.length - len(self.tokens)

    @property
    def remaining(self) -> int:
        """Positions to compute before the next token can be sampled."""
        return self.length - self.computed

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be sampled for it here, beyond those of given-out plans."""
        return self.last_len - self.length

    @property
    def all_sampled(self) -> bool:
        """True when given-out plans sample the last token it can have: it needs no further step."""
        return self.tokens_left <= 0

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens of prompt-like work (prompt, or recompute) that are still to be planned."""
        if self.ticket is not None or self.phase == "pulling":
            return 0
        return self.remaining if self.phase == "waiting" else max(self.remaining - 1, 0)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until the first generated token went out with them."""
        return self.request.sampling.prompt_logprobs is not None and self.num_output == 0

    def hashes(self, num_blocks: int, block_size: int) -> list[int]:
        """Hashes of the first `num_blocks` blocks; their tokens must be known."""
        lacking = num_blocks - len(self._hashes)
        if lacking > 0:
            extend_hashes(self._hashes, self.tokens, block_size, self.request.cache_salt, max_blocks=lacking)
        return self._hashes[:num_blocks]

    def admit(self, blocks: list[int], *, registered: int, cached: int, row: int, slot: int) -> None:
        """Take room. `registered` blocks of it are known to the prefix cache, `cached` positions need no step."""
        self.blocks, self.row, self.slot = blocks, row, slot
        self.registered = registered
        self.computed = self.settled = cached
        self.known_len = len(self.tokens)
        self._prompt_logprobs.clear()
        if not self.told:
            self.cached_tokens = min(cached, self.prompt_len)

    def vacate(self) -> None:
        """Hold no room any more."""
        self.blocks = []
        self.drafts_ready = 0
        self.row = self.slot = -1

    def start(self, block_size: int) -> RowStart:
        """What the ranks need to know to hold this sequence in its row; right behind `admit`."""
        sampling = row_sampling(self.request.sampling, prompt_logprobs=self.wants_prompt_logprobs)
        return RowStart(
            row=self.row,
            token_ids=tuple(self.tokens),
            prompt_len=self.prompt_len,
            blocks=tuple(self.blocks),
            num_stored=self.registered * block_size,
            state_slot=self.slot,
            sampling=sampling,
        )

    def collect(self, columns: LogprobColumns) -> None:
        """Keep the prompt log probabilities of one chunk."""
        count = self.request.sampling.prompt_logprobs or 0
        self._prompt_logprobs += [token_logprob(columns, i, count) for i in range(len(columns.logprobs_N))]

    def resolve(self, accepted: int) -> None:
        """A plan that verified drafts is committed: this many of them count, as computed and as sampled."""
        self.uncertain = False
        self.computed += accepted
        self.length += accepted

    def take(self, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Commit one sampled token and tell it."""
        request, first = self.request, not self.told
        wanted = first and self.wants_prompt_logprobs
        prompt_logprobs = (None, *self._prompt_logprobs[: self.prompt_len - 1]) if wanted else ()
        self.tokens.append(token_id)
        self.told = True
        num_output, sampling = len(self.tokens) - self.prompt_len, request.sampling
        finish: FinishReason | None = "length" if num_output >= sampling.max_tokens else None
        if token_id in sampling.stop_token_ids and num_output > sampling.min_tokens:
            finish = "stop"
        return TokenEvent(
            request_id=request.id,
            index=num_output - 1,
            token_id=token_id,
            finish=finish,
            logprob=logprob,
            cached_tokens=self.cached_tokens if first else 0,
            prompt_logprobs=prompt_logprobs,
        )

    def end(self, finish: FinishReason, error: str = "") -> TokenEvent:
        """Tell an end that brings no token."""
        return TokenEvent(request_id=self.request.id, index=self.num_output, token_id=None, finish=finish, error=error)


def token_logprob(columns: LogprobColumns, index: int, count: int) -> TokenLogprob:
    """Entry `index` of the columns with at most `count` alternatives."""
    return TokenLogprob(
        logprob=columns.logprobs_N[index],
        rank=columns.ranks_N[index],
        top_ids=tuple(columns.top_ids_NK[index][:count]),
        top_logprobs=tuple(columns.top_logprobs_NK[index][:count]),
    )


def row_sampling(params: SamplingParams, *, prompt_logprobs: bool) -> RowSampling:
    """A request's sampling as the ranks read it."""
    return RowSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        min_tokens=params.min_tokens,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs if prompt_logprobs else None,
    )
