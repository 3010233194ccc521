"""The one validation layer: what HTTP and gRPC clients may ask, as plain data, and the router requests it becomes."""

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.chat import ChatPrompt
from deploy.served_model import ServedModel
from router.errors import InvalidRequestError, UnknownModelError
from router.request import Request, RequestId, SamplingParams

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps on every list and number that a client can send."""

    max_n: int = 16
    max_choices: int = 128
    """Prompts times `n` of one request."""
    max_prompts: int = 128
    max_messages: int = 4096
    max_tools: int = 128
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_top_logprobs: int = 20
    max_priority: int = 100
    """Priorities go from minus this to this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompts:
    """Prompts as text; each is encoded whole, special tokens included."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompts:
    """Prompts as token ids."""

    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingInput:
    """Sampling as a client gave it; None is "not said"."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationInput:
    """One call of a client, whichever API it came by."""

    model: str
    prompt: TextPrompts | TokenPrompts | ChatPrompt
    sampling: SamplingInput = SamplingInput()
    n: int = 1
    stop: tuple[str, ...] = ()
    default_max_tokens: int | None = None
    """What this API gives where the client names no `max_tokens`; None fills the context."""
    priority: int = 0
    tenant: str = ""
    deadline_unix_s: float | None = None


# Field, lowest, highest, and whether the lowest itself is allowed.
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("max_tokens", 1, math.inf, True),
    ("min_tokens", 0, math.inf, True),
    ("temperature", 0, 2, True),
    ("top_p", 0, 1, False),
    ("top_k", -1, 2**31 - 1, True),
    ("min_p", 0, 1, True),
    ("presence_penalty", -2, 2, True),
    ("frequency_penalty", -2, 2, True),
    ("repetition_penalty", 0, 10, False),
    ("seed", -(2**63), 2**64 - 1, True),
)


def validate(given: GenerationInput, model: ServedModel, limits: Limits) -> None:
    """Check everything that can be checked before a tokenizer is needed.

    Raises:
        UnknownModelError: the model is not the one served here.
        InvalidRequestError: names the field, the value and what would do.
    """
    if given.model != model.name:
        raise UnknownModelError(f"model {given.model[:200]!r} is not served here; use {model.name!r}")
    _check_sampling(given.sampling, model, limits)
    _check_range("n", given.n, 1, limits.max_n)
    _check_range("priority", given.priority, -limits.max_priority, limits.max_priority)
    _check_stop(given.stop, limits)
    match given.prompt:
        case ChatPrompt():
            _check_chat(given.prompt, limits)
        case TextPrompts(texts=prompts):
            _check_prompt_count(len(prompts), given.n, limits)
        case TokenPrompts(token_ids=prompts):
            _check_prompt_count(len(prompts), given.n, limits)
            for ids in prompts:
                # The length first: it is no work.
                _check_prompt_length("prompt", len(ids), model)
                _check_token_ids("prompt", ids, model)


def check_text_length(text: str, *, max_chars: int) -> None:
    """Refuse a text that cannot fit the context whatever its tokens are, before it is encoded.

    Raises:
        InvalidRequestError: it is longer than `max_chars`.
    """
    if len(text) > max_chars:
        raise InvalidRequestError(
            f"prompt: {len(text)} characters cannot fit the model's context; shorten it to less than {max_chars}",
            field="prompt",
        )


def build_requests(
    given: GenerationInput, prompts: Sequence[tuple[int, ...]], model: ServedModel, *, request_id: str
) -> tuple[Request, ...]:
    """Make the router requests of a validated input: choice `p * n + i` is choice i of prompt p.

    Choice 0 of each prompt has the client's seed, the others have seeds derived from it, so that a choice does not
    depend on how many were asked for.

    Raises:
        InvalidRequestError: a prompt is empty, or does not fit the context together with its new tokens.
    """
    seed = given.sampling.seed if given.sampling.seed is not None else secrets.randbits(63)
    requests: list[Request] = []
    for prompt_ids in prompts:
        max_tokens = _max_tokens(given, len(prompt_ids), model)
        for choice in range(given.n):
            requests.append(
                Request(
                    id=RequestId(f"{request_id}-{len(requests)}"),
                    prompt_ids=prompt_ids,
                    sampling=_sampling_params(given.sampling, model, max_tokens, choice_seed(seed, choice)),
                    priority=given.priority,
                    tenant=given.tenant,
                    cache_salt=given.tenant,
                    deadline_unix_s=given.deadline_unix_s,
                )
            )
    return tuple(requests)


def choice_seed(seed: int, choice: int) -> int:
    """The 64-bit seed of one choice; choice 0 has the seed itself."""
    if choice == 0:
        return seed & _MASK_64
    text = f"{seed & _MASK_64}/{choice}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _sampling_params(given: SamplingInput, model: ServedModel, max_tokens: int, seed: int) -> SamplingParams:
    defaults = model.defaults
    ends = () if given.ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=given.min_tokens or 0,
        temperature=_given_or(given.temperature, defaults.temperature),
        top_p=_given_or(given.top_p, defaults.top_p),
        top_k=max(0, given.top_k if given.top_k is not None else defaults.top_k),
        min_p=_given_or(given.min_p, defaults.min_p),
        presence_penalty=given.presence_penalty or 0.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        repetition_penalty=_given_or(given.repetition_penalty, defaults.repetition_penalty),
        logit_bias=given.logit_bias,
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys((*given.stop_token_ids, *ends))),
        logprobs=given.logprobs,
        prompt_logprobs=given.prompt_logprobs,
    )


def _given_or(given: float | None, default: float) -> float:
    return default if given is None else float(given)


def _max_tokens(given: GenerationInput, num_prompt_tokens: int, model: ServedModel) -> int:
    """How many new tokens one prompt may get."""
    limit = model.max_model_len
    _check_prompt_length("messages" if isinstance(given.prompt, ChatPrompt) else "prompt", num_prompt_tokens, model)
    room = limit - num_prompt_tokens
    asked = given.sampling.max_tokens
    if asked is None:
        wanted = [each for each in (given.default_max_tokens, model.defaults.max_tokens) if each is not None]
        return max(min([room, *wanted]), min(given.sampling.min_tokens or 1, room))
    if asked > room:
        raise InvalidRequestError(
            f"max_tokens: {asked} new tokens and {num_prompt_tokens} prompt tokens exceed the model's context of "
            f"{limit} tokens (max_model_len); ask for at most {room}",
            field="max_tokens",
        )
    return asked


def _check_prompt_length(field: str, num_tokens: int, model: ServedModel) -> None:
    limit = model.max_model_len
    if num_tokens == 0:
        raise InvalidRequestError(f"{field}: is empty; it must have at least one token", field=field)
    if num_tokens >= limit:
        raise InvalidRequestError(
            f"{field}: {num_tokens} tokens leave no room for output in the model's context of {limit} tokens "
            f"(max_model_len); send at most {limit - 1}",
            field=field,
        )


def _check_sampling(given: SamplingInput, model: ServedModel, limits: Limits) -> None:
    for field, low, high, closed in _RANGES:
        _check_range(field, getattr(given, field), low, high, closed=closed)
    _check_min_tokens(given, model)
    _check_range("top_logprobs", given.logprobs, 0, limits.max_top_logprobs)
    _check_range("prompt_logprobs", given.prompt_logprobs, 0, limits.max_top_logprobs)
    _check_count("stop_token_ids", len(given.stop_token_ids), limits.max_stop_token_ids)
    _check_token_ids("stop_token_ids", given.stop_token_ids, model)
    _check_count("logit_bias", len(given.logit_bias), limits.max_logit_bias)
    _check_token_ids("logit_bias", [token_id for token_id, _ in given.logit_bias], model)
    for token_id, bias in given.logit_bias:
        _check_range(f"logit_bias.{token_id}", bias, -100, 100)


def _check_min_tokens(given: SamplingInput, model: ServedModel) -> None:
    most = given.max_tokens if given.max_tokens is not None else model.max_model_len
    if given.min_tokens is not None and given.min_tokens > most:
        raise InvalidRequestError(
            f"min_tokens: {given.min_tokens} is more than the {most} tokens that may be generated; lower it",
            field="min_tokens",
        )


def _check_range(field: str, value: float | None, low: float, high: float, *, closed: bool = True) -> None:
    """Refuse a value outside [low, high], or ]low, high] if not closed; NaN is outside."""
    if value is None or (low < value <= high) or (closed and value == low):
        return
    lower = f"at least {low}" if closed else f"above {low}"
    upper = "" if math.isinf(high) else f" and at most {high}"
    raise InvalidRequestError(f"{field}: must be {lower}{upper}, got {value}", field=field)


def _check_count(field: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(f"{field}: has {count} entries; send at most {most}", field=field)


def _check_token_ids(field: str, ids: Sequence[int], model: ServedModel) -> None:
    # A long prompt is checked in a tenth of the time that a loop in Python takes.
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        wrong = next(each for each in ids if not 0 <= each < model.vocab_size)
        raise InvalidRequestError(
            f"{field}: token id {wrong} is not in the model's vocabulary; use ids from 0 to {model.vocab_size - 1}",
            field=field,
        )


def _check_stop(stop: Sequence[str], limits: Limits) -> None:
    _check_count("stop", len(stop), limits.max_stop_strings)
    for text in stop:
        if not text or len(text) > limits.max_stop_chars:
            raise InvalidRequestError(
                f"stop: a stop string must have 1 to {limits.max_stop_chars} characters, got {len(text)}", field="stop"
            )


def _check_prompt_count(count: int, n: int, limits: Limits) -> None:
    if count == 0:
        raise InvalidRequestError("prompt: the list is empty; send at least one prompt", field="prompt")
    _check_count("prompt", count, limits.max_prompts)
    if count * n > limits.max_choices:
        raise InvalidRequestError(
            f"n: {count} prompts times n={n} are {count * n} choices; ask for at most {limits.max_choices}", field="n"
        )


def _check_chat(chat: ChatPrompt, limits: Limits) -> None:
    if not chat.messages:
        raise InvalidRequestError("messages: the list is empty; send at least one message", field="messages")
    _check_count("messages", len(chat.messages), limits.max_messages)
    _check_count("tools", len(chat.tools), limits.max_tools)
    for index, message in enumerate(chat.messages):
        if message.tool_calls and message.role != "assistant":
            field = f"messages[{index}].tool_calls"
            raise InvalidRequestError(f"{field}: only an assistant message has tool calls; remove them", field=field)
