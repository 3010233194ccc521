"""A request and its tokens as every part of MoEFleet speaks of them: plain data, no text."""

from dataclasses import dataclass
from typing import Final, Literal, NewType

RequestId = NewType("RequestId", str)
MemberId = NewType("MemberId", str)
Role = Literal["prefill", "decode", "mixed"]
FinishReason = Literal["stop", "length", "abort", "error"]
FIRST_PRIORITY: Final = 2
"""At a member: requests from here on go before others' prompts, and those leave room for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose each next token.

    Values are checked where a request enters (`deploy.validation`), not here.
    """

    max_tokens: int
    min_tokens: int = 0
    """`stop_token_ids` cannot be chosen before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs (token id, bias added to its logit)."""
    seed: int = 0
    """64 bits. Noise is a function of (seed, position) only; the gateway draws one where a client gives none."""
    stop_token_ids: tuple[int, ...] = ()
    """A sequence ends after any of these; the model's end tokens are among them unless the client ignores them."""
    logprobs: int | None = None
    """Number of top alternatives reported a token; 0 reports the chosen token alone, None nothing."""
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asked, small and explicit enough to be moved to another member at any token."""

    id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    """Tokens already emitted, by whichever member; generation goes on behind them."""
    priority: int = 0
    """Higher goes first."""
    tenant: str = ""
    cache_salt: str = ""
    """Requests of different salts never share cached blocks."""
    deadline_unix_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability of one position's token and of its most likely alternatives (raw, before sampling changes)."""

    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


# Not frozen: one is made for every token, and making a frozen one takes three times as long.
@dataclass(slots=True, kw_only=True)
class TokenEvent:
    """One new token of a request, or its end. Never changed once made.

    A request's events carry indices without a gap. The last event has `finish`; `token_id` is None only
    when a request ends without a further token (abort, error).
    """

    request_id: RequestId
    index: int
    """Position in the output, 0 for the first generated token."""
    token_id: int | None
    finish: FinishReason | None = None
    logprob: TokenLogprob | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the prefix cache; on the first event of a member."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """On the first event, if asked for; the first prompt token has None."""
    error: str = ""
    """Why, when finish is "error"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """One new token of each of several requests that go on, with nothing else to tell: as many `TokenEvent`s."""

    request_ids: list[RequestId]
    """The same object in step after step, while these stay the same."""
    indices: list[int]
    token_ids: list[int]

    def events(self) -> list[TokenEvent]:
        """One by one."""
        columns = zip(self.request_ids, self.indices, self.token_ids, strict=True)
        return [TokenEvent(request_id=name, index=index, token_id=token) for name, index, token in columns]
