"""`moefleet generate`: prompts in, continuations out, with an engine of this process and no Ray."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TextIO

from cluster.config import EngineConfig
from cluster.executor import Ranks
from cluster.reports import LoadProgress as BytesRead
from cluster.resolve import ResolvedEngine, resolve_engine
from cluster.spawn import LocalReplica
from cluster.torchrun import TorchrunReplica, run_torchrun_peer, torchrun_place
from deploy.checkpoint_progress import LoadProgress
from deploy.local_engine import stream_all
from deploy.prompts_file import PromptInput, parse_ids, read_prompts_file
from deploy.served_model import SamplingDefaults, ServedModel, load_served_model
from deploy.text_stream import TextStream
from deploy.tokenizer import TextTokenizer, load_tokenizer
from deploy.validation import (
    GenerationInput,
    Limits,
    SamplingInput,
    TextPrompts,
    TokenPrompts,
    build_requests,
    validate,
)
from router.errors import ConfigError, InvalidRequestError
from router.request import Request, RequestId, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What `moefleet generate` was asked."""

    engine: EngineConfig
    sampling: SamplingInput
    """For every prompt; temperature None is greedy. What generation_config.json suggests is not applied."""
    prompts: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    """Each such as "1,2,3"."""
    prompts_file: Path | None = None
    json: bool = False
    """One JSON object a prompt and line; else plain text."""
    ranks: Literal["spawn", "torchrun"] = "spawn"
    """Who starts the ranks: this process its children, or torchrun, which runs this in every rank."""


class Replica(Protocol):
    """Loaded ranks that end with their context."""

    @property
    def ranks(self) -> Ranks:
        """The ranks."""
        ...


def run_generate(options: GenerateOptions, out: TextIO) -> int:
    """Continue every prompt and write the results to `out`, in the order --prompt, --prompt-ids, --prompts-file.

    Returns:
        a process exit status.

    Raises:
        MoefleetError: an option, prompt or checkpoint cannot work, or a rank was lost.
    """
    if options.ranks == "torchrun":
        place = torchrun_place()
        engine = resolve_engine(options.engine, ranks_here=place.ranks_here)
        if place.rank:
            return run_torchrun_peer(engine, place)
        _run(options, engine, lambda told: TorchrunReplica(engine, place, on_progress=told), out)
        return 0
    engine = resolve_engine(options.engine)
    _run(options, engine, lambda told: LocalReplica(engine, on_progress=told), out)
    return 0


def _run(
    options: GenerateOptions,
    engine: ResolvedEngine,
    open_replica: Callable[[Callable[[BytesRead], None]], AbstractContextManager[Replica]],
    out: TextIO,
) -> None:
    prompts = _all_prompts(options)
    tokenizer = _tokenizer(engine.config.model, prompts)
    served = _served_model(engine)
    requests = [_request(prompt, index, served, tokenizer) for index, prompt in enumerate(prompts)]
    with ExitStack() as opened:
        with LoadProgress("loading weights") as bar:
            replica = opened.enter_context(open_replica(lambda told: bar(told.done_bytes, told.total_bytes)))
        outputs = generate_all(engine, replica.ranks, requests)
    for index, events in enumerate(outputs):
        result = _result(requests[index], events, tokenizer)
        if options.json:
            out.write(json.dumps(result) + "\n")
        else:
            label = f"[{index}] " if len(requests) > 1 else ""
            out.write(f"{label}{result['text']}\n")
    out.flush()


def generate_all(engine: ResolvedEngine, ranks: Ranks, requests: Sequence[Request]) -> list[list[TokenEvent]]:
    """Serve requests together on ranks that are loaded -> each one's token events, in order; the ranks stay up.

    Raises:
        MoefleetError: a request was rejected, or the ranks failed.
    """
    found: dict[RequestId, list[TokenEvent]] = {request.id: [] for request in requests}
    for events in stream_all(engine, ranks, requests):
        for event in events:
            found[event.request_id].append(event)
    return [found[request.id] for request in requests]


def _all_prompts(options: GenerateOptions) -> list[PromptInput]:
    sampling = options.sampling
    found = [
        PromptInput(where=f"--prompt number {number}", text=text, sampling=sampling)
        for number, text in enumerate(options.prompts, start=1)
    ]
    for number, text in enumerate(options.prompt_ids, start=1):
        where = f"--prompt-ids number {number}"
        found.append(PromptInput(where=where, token_ids=parse_ids(text, where), sampling=sampling))
    if options.prompts_file is not None:
        found += read_prompts_file(options.prompts_file, sampling)
    if not found:
        raise ConfigError("no prompt: give --prompt TEXT, --prompt-ids 1,2,3 or --prompts-file FILE.jsonl")
    return found


def _tokenizer(model: Path, prompts: Sequence[PromptInput]) -> TextTokenizer | None:
    """The checkpoint's tokenizer; None where it has none and no prompt needs one."""
    if not (model / "tokenizer.json").is_file() and all(prompt.text is None for prompt in prompts):
        return None
    return load_tokenizer(model)


def _served_model(engine: ResolvedEngine) -> ServedModel:
    """The model with neutral, greedy defaults and the length that fits here."""
    served = load_served_model(engine.config.model, name=engine.config.model.name)
    return replace(served, max_model_len=engine.max_model_len, defaults=SamplingDefaults(temperature=0.0))


def _request(prompt: PromptInput, index: int, served: ServedModel, tokenizer: TextTokenizer | None) -> Request:
    try:
        if prompt.text is None:
            given = GenerationInput(
                model=served.name, prompt=TokenPrompts(token_ids=(prompt.token_ids,)), sampling=prompt.sampling
            )
            ids = prompt.token_ids
        else:
            assert tokenizer is not None
            given = GenerationInput(
                model=served.name, prompt=TextPrompts(texts=(prompt.text,)), sampling=prompt.sampling
            )
            ids = tokenizer.encode(prompt.text)
        validate(given, served, Limits())
        (request,) = build_requests(given, [ids], served, request_id=f"prompt{index}")
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{prompt.where}: {error}", field=error.field) from error
    return request


def _result(request: Request, events: Sequence[TokenEvent], tokenizer: TextTokenizer | None) -> dict[str, object]:
    """One prompt's JSON object."""
    token_ids = [event.token_id for event in events if event.token_id is not None]
    finish = events[-1].finish
    result: dict[str, object] = {
        "token_ids": token_ids,
        "text": None if tokenizer is None else _text(request, token_ids, finish == "stop", tokenizer),
        "finish_reason": finish,
        "usage": {
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(token_ids),
            "total_tokens": len(request.prompt_ids) + len(token_ids),
            "cached_tokens": events[0].cached_tokens,
        },
    }
    if request.sampling.logprobs is not None:
        result["logprobs"] = [_logprob(event.logprob) for event in events]
    if request.sampling.prompt_logprobs is not None:
        result["prompt_logprobs"] = [_logprob(entry) for entry in events[0].prompt_logprobs]
    return result


def _text(request: Request, token_ids: list[int], stopped: bool, tokenizer: TextTokenizer) -> str:
    """The output's text, without the token that ended it."""
    ends = stopped and token_ids[-1] in request.sampling.stop_token_ids
    stream = TextStream()
    shown = [stream.push(tokenizer.text_bytes(token_id)).text for token_id in (token_ids[:-1] if ends else token_ids)]
    return "".join(shown) + stream.finish().text


def _logprob(entry: TokenLogprob | None) -> dict[str, object] | None:
    if entry is None:
        return None
    top = [[token_id, logprob] for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)]
    return {"logprob": entry.logprob, "rank": entry.rank, "top": top}
