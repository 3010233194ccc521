"""Log probabilities in the forms that OpenAI's two endpoints have."""

from collections.abc import Sequence

from deploy.generation import Delta
from deploy.schema import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprob, PromptLogprobs, TopLogprob
from deploy.tokenizer import TextTokenizer
from router.request import TokenLogprob

# JSON has no infinity: what a probability of zero is told as, by vLLM too.
_LOWEST = -9999.0


def chat_logprobs(delta: Delta, tokenizer: TextTokenizer) -> ChatLogprobs:
    """The chat form: token text, its bytes, and alternatives."""
    entries: list[ChatLogprob] = []
    for token_id, chosen in zip(delta.token_ids, delta.logprobs, strict=True):
        top = [
            _top(tokenizer, each, logprob) for each, logprob in zip(chosen.top_ids, chosen.top_logprobs, strict=True)
        ]
        own = _top(tokenizer, token_id, chosen.logprob)
        entries.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=entries, refusal=None)


def completion_logprobs(delta: Delta, tokenizer: TextTokenizer, *, offset: int) -> CompletionLogprobs:
    """The text-completion form: parallel lists, and each token's place in the text, `offset` being the first's."""
    tokens: list[str] = []
    offsets: list[int] = []
    tops: list[dict[str, float]] = []
    for token_id, chosen in zip(delta.token_ids, delta.logprobs, strict=True):
        tokens.append(token_text(tokenizer, token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
        pairs = zip(chosen.top_ids, chosen.top_logprobs, strict=True)
        tops.append({token_text(tokenizer, each): _finite(logprob) for each, logprob in pairs})
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(chosen.logprob) for chosen in delta.logprobs],
        top_logprobs=tops,
        text_offset=offsets,
    )


def prompt_logprobs(delta: Delta, prompt_ids: Sequence[int], tokenizer: TextTokenizer) -> PromptLogprobs:
    """One object a prompt token: token id -> logprob, rank and text; null for the first."""
    positions = zip(prompt_ids, delta.prompt_logprobs, strict=True)
    return [None if each is None else _prompt_position(token_id, each, tokenizer) for token_id, each in positions]


def _prompt_position(token_id: int, chosen: TokenLogprob, tokenizer: TextTokenizer) -> dict[str, PromptLogprob]:
    found = {
        str(top_id): PromptLogprob(logprob=_finite(logprob), rank=rank, decoded_token=token_text(tokenizer, top_id))
        for rank, (top_id, logprob) in enumerate(zip(chosen.top_ids, chosen.top_logprobs, strict=True), start=1)
    }
    found[str(token_id)] = PromptLogprob(
        logprob=_finite(chosen.logprob), rank=chosen.rank, decoded_token=token_text(tokenizer, token_id)
    )
    return found


def token_text(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token's text; one that is no text alone is written as `bytes:\\xe4\\xbd`, so that no two look the same."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(tokenizer: TextTokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode(errors="replace"), logprob=_finite(logprob), bytes=list(data))


def _finite(logprob: float) -> float:
    # Also false for NaN, which JSON has not either.
    return logprob if logprob > _LOWEST else _LOWEST
