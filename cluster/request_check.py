"""Whether an engine can serve a request at all. Pure.

Clients' values are checked where they enter the system; this is the engine's own line, so that no request, from
whichever gateway, can end the steps of all others.
"""

from collections.abc import Sequence
from typing import Final

from cluster.plan import KvTicket
from cluster.scheduler_config import SchedulerConfig
from router.errors import HandoffError, InvalidRequestError
from router.request import Request, SamplingParams

MAX_PROMPT_LOGPROBS: Final = 500_000
"""Numbers of prompt log probabilities that one request may ask for: they leave in one message."""
_SEEDS: Final = 1 << 64


def check_request(request: Request, config: SchedulerConfig, *, prefill_only: bool) -> None:
    """Refuse what can never be served with these limits.

    Args:
        request: a request as it came from a gateway.
        config: the engine's limits.
        prefill_only: it ends at its first token here.

    Raises:
        InvalidRequestError: names the field, the value and what would do.
    """
    prompt, done, new = len(request.prompt_ids), len(request.output_ids), request.sampling.max_tokens
    if not prompt:
        raise _invalid("prompt_ids", "is empty; send at least one token")
    if done >= new:
        raise _invalid("max_tokens", f"must exceed the {done} tokens generated so far, got {new}")
    if prompt + new > config.max_model_len:
        raise _invalid(
            "max_tokens",
            f"{new} and a prompt of {prompt} tokens are {prompt + new}, over the limit of {config.max_model_len}; "
            "shorten the prompt or ask for fewer tokens",
        )
    # The last generated token is never computed.
    need = config.blocks_for(prompt + done if prefill_only else prompt + new - 1)
    if need > config.num_blocks:
        raise _invalid(
            "max_tokens",
            f"{new} and a prompt of {prompt} tokens need {need} KV blocks of {config.block_size} tokens, the cache has "
            f"{config.num_blocks}; ask for less or raise kv_memory_bytes",
        )
    _check_sampling(request.sampling, prompt)
    _check_ids("prompt_ids", request.prompt_ids, config.vocab_size)
    _check_ids("output_ids", request.output_ids, config.vocab_size)
    _check_ids("stop_token_ids", request.sampling.stop_token_ids, config.vocab_size)
    _check_ids("logit_bias", [token_id for token_id, _ in request.sampling.logit_bias], config.vocab_size)


def check_ticket(request: Request, ticket: KvTicket) -> None:
    """Refuse to go on with a request behind KV that is not a part of its own.

    Raises:
        HandoffError: says what does not fit.
    """
    num_tokens = len(request.prompt_ids) + len(request.output_ids)
    room = len(ticket.blocks) * ticket.layout.block_size
    if not 0 < ticket.num_tokens < num_tokens or ticket.num_tokens > room:
        raise HandoffError(
            f"{request.id}: ticket has {ticket.num_tokens} positions in {len(ticket.blocks)} blocks for a request "
            f"of {num_tokens} tokens; send it again without the ticket"
        )


def _check_sampling(sampling: SamplingParams, prompt: int) -> None:
    """Values that the ranks cannot work with; any float gives some token."""
    if not 0 <= sampling.seed < _SEEDS:
        raise _invalid("seed", f"must be 64 bits without a sign, got {sampling.seed}")
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise _invalid("logprobs", f"must be at least 0, got {sampling.logprobs}")
    if sampling.prompt_logprobs is None:
        return
    if sampling.prompt_logprobs < 0:
        raise _invalid("prompt_logprobs", f"must be at least 0, got {sampling.prompt_logprobs}")
    numbers = prompt * (1 + sampling.prompt_logprobs)
    if numbers > MAX_PROMPT_LOGPROBS:
        raise _invalid(
            "prompt_logprobs",
            f"{sampling.prompt_logprobs} for a prompt of {prompt} tokens are {numbers} numbers, the limit is "
            f"{MAX_PROMPT_LOGPROBS}; ask for fewer or send a shorter prompt",
        )


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    # A long prompt is checked in a tenth of the time that a loop in Python takes.
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise _invalid(
            field,
            f"has token id {wrong}, the model's ids are 0 to {vocab_size - 1}; use the tokenizer of the served model",
        )


def _invalid(field: str, rest: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {rest}", field=field)
