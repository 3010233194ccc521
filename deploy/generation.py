"""One client request from validated input to text: shared by HTTP and gRPC."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol

from deploy.chat import ChatPrompt, count_chars, render_chat
from deploy.health import HealthReport, health_report
from deploy.metrics import GatewayMetrics
from deploy.served_model import ServedModel
from deploy.text_stream import TextStream
from deploy.tokenizer import TextTokenizer
from deploy.trace import RequestTrace
from deploy.validation import (
    GenerationInput,
    Limits,
    TextPrompts,
    TokenPrompts,
    build_requests,
    check_text_length,
    validate,
)
from router.errors import DeadlineExceededError, MemberLostError, MoefleetError, NoMemberError
from router.load import MemberLoad
from router.request import Request, TokenEvent, TokenLogprob

logger = logging.getLogger(__name__)

# Encoding runs at some 5 MB/s: shorter text is done in less time than it takes to hand it to a thread and back.
_THREAD_CHARS = 8192


class TokenStream(Protocol):
    """The events of one request; closing it aborts the request."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """The events, in order."""
        ...

    async def __anext__(self) -> TokenEvent:
        """The next event."""
        ...

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        ...


class Backend(Protocol):
    """Where requests are served: the dispatcher of a fleet, or one engine."""

    def generate(self, request: Request) -> TokenStream:
        """Serve a request; iterating raises `router.errors`."""
        ...

    def check_room(self, tenant: str, priority: int) -> None:
        """Return if a request may be worth looking at.

        Raises:
            OverloadedError: it would be refused whatever it asks for.
        """
        ...

    async def health(self) -> None:
        """Return if requests can be served.

        Raises:
            MoefleetError: they cannot, and why.
        """
        ...

    def loads(self) -> tuple[MemberLoad, ...]:
        """The latest load of every member."""
        ...

    def waiting(self) -> Mapping[int, int]:
        """Requests that wait for their turn before any member has them, by priority class: 1, 0 and -1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one token event adds to one choice."""

    choice: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """On the first delta of a choice, if asked for."""
    cached_tokens: int = 0
    finish: Literal["stop", "length"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A validated and encoded request, ready to be served."""

    id: str
    created_unix_s: int
    given: GenerationInput
    prompts: tuple[tuple[int, ...], ...]
    requests: tuple[Request, ...]
    """One a choice; choice p * n + i is choice i of prompt p."""
    thinking: bool
    """Output begins with reasoning."""
    trace: RequestTrace

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))


class UsageCount:
    """Counts the tokens of one generation as its deltas pass."""

    def __init__(self, generation: Generation) -> None:
        self.prompt_tokens = generation.num_prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._n = generation.given.n

    def add(self, delta: Delta) -> None:
        """Count one delta; cached prompt tokens once a prompt."""
        self.completion_tokens += len(delta.token_ids)
        if delta.choice % self._n == 0:
            self.cached_tokens += delta.cached_tokens


class ChoiceOutput:
    """The output of one choice: token events in, deltas out."""

    def __init__(self, index: int, request: Request, stop: Sequence[str], tokenizer: TextTokenizer) -> None:
        self._index = index
        self._ends = frozenset(request.sampling.stop_token_ids)
        self._tokenizer = tokenizer
        self._text = TextStream(stops=stop, min_tokens=request.sampling.min_tokens)

    def take(self, event: TokenEvent) -> Delta:
        """Turn an event into a delta.

        Raises:
            MemberLostError: the request was aborted behind our back.
            MoefleetError: the request failed.
        """
        if event.finish == "abort":
            raise MemberLostError(f"request {event.request_id} was ended by the server; send it again")
        if event.finish == "error":
            logger.error("%s failed: %s", event.request_id, event.error)
            raise MoefleetError(event.error)
        finish = event.finish
        text = ""
        if event.token_id is not None and not (finish == "stop" and event.token_id in self._ends):
            piece = self._text.push(self._tokenizer.text_bytes(event.token_id))
            text, finish = piece.text, "stop" if piece.stopped else finish
            if piece.stopped:
                return self._delta(event, text, finish)
        if finish is not None:
            piece = self._text.finish()
            text, finish = text + piece.text, "stop" if piece.stopped else finish
        return self._delta(event, text, finish)

    def _delta(self, event: TokenEvent, text: str, finish: Literal["stop", "length"] | None) -> Delta:
        return Delta(
            choice=self._index,
            text=text,
            token_ids=() if event.token_id is None else (event.token_id,),
            logprobs=() if event.logprob is None else (event.logprob,),
            prompt_logprobs=event.prompt_logprobs,
            cached_tokens=event.cached_tokens,
            finish=finish,
        )


class GenerationService:
    """Serves generations of one model from one back end."""

    def __init__(
        self,
        *,
        backend: Backend,
        tokenizer: TextTokenizer,
        model: ServedModel,
        metrics: GatewayMetrics,
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._backend = backend
        self._limits = limits or Limits()
        self._leaving = False
        self._max_chars = model.max_model_len * tokenizer.longest_token_chars

    def check_room(self, tenant: str, priority: int) -> None:
        """Refuse what needs no reading to be refused: in an overload that is most of what comes.

        Raises:
            OverloadedError: the tenant's requests of that priority are refused at present, whatever they ask for.
        """
        self._backend.check_room(tenant, priority)

    async def prepare(self, given: GenerationInput, *, prefix: str = "gen") -> Generation:
        """Validate and encode; nothing is queued yet.

        Raises:
            UnknownModelError, InvalidRequestError: the request cannot be served as it is.
        """
        trace = RequestTrace(time.monotonic)
        validate(given, self.model, self._limits)
        prompts, thinking = await self._encode(given)
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        requests = build_requests(given, prompts, self.model, request_id=request_id)
        trace.mark_tokenized()
        return Generation(
            id=request_id,
            created_unix_s=int(time.time()),
            given=given,
            prompts=prompts,
            requests=requests,
            thinking=thinking,
            trace=trace,
        )

    async def stream(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        """Serve a generation; closing the iterator aborts what still runs.

        Raises:
            MoefleetError: whatever the back end raises, and DeadlineExceededError when the deadline has passed.
        """
        self.metrics.request_started(generation.num_prompt_tokens)
        generation.trace.mark_dispatched()
        choices = [self._choice(generation, index) for index in range(len(generation.requests))]
        open_choices = len(choices)
        try:
            async with aclosing(choices[0] if len(choices) == 1 else _merge(choices)) as deltas:
                async for delta in deltas:
                    open_choices -= delta.finish is not None
                    yield delta
        finally:
            self.metrics.request_ended(generation.trace, complete=open_choices == 0)
            logger.debug("%s %s", generation.id, generation.trace.describe())

    def leave(self) -> None:
        """Tell whoever asks for health to send requests elsewhere; those that come are served."""
        self._leaving = True

    async def health(self) -> HealthReport:
        """Whether requests can be served now, and still will be in a while."""
        if self._leaving:
            return health_report(self.loads(), NoMemberError("this gateway is leaving; use another one"))
        try:
            await self._backend.health()
        except MoefleetError as error:
            return health_report(self.loads(), error)
        return health_report(self.loads(), None)

    def loads(self) -> tuple[MemberLoad, ...]:
        """The latest load of every member."""
        return self._backend.loads()

    def scrape(self) -> bytes:
        """The text of the metrics as they are now."""
        return self.metrics.render(self.loads(), self._backend.waiting())

    async def _encode(self, given: GenerationInput) -> tuple[tuple[tuple[int, ...], ...], bool]:
        """Token ids of each prompt, and whether output begins with reasoning."""
        match given.prompt:
            case TokenPrompts(token_ids=token_ids):
                return token_ids, False
            case TextPrompts(texts=texts):
                for text in texts:
                    check_text_length(text, max_chars=self._max_chars)
                if sum(map(len, texts)) > _THREAD_CHARS:
                    return await asyncio.to_thread(self._encode_texts, texts), False
                return self._encode_texts(texts), False
            case ChatPrompt() as chat:
                if count_chars(chat) > _THREAD_CHARS:
                    rendered = await asyncio.to_thread(render_chat, self.tokenizer, chat, max_chars=self._max_chars)
                else:
                    rendered = render_chat(self.tokenizer, chat, max_chars=self._max_chars)
                return (rendered.token_ids,), rendered.thinking

    def _encode_texts(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(self.tokenizer.encode(text) for text in texts)

    async def _choice(self, generation: Generation, index: int) -> AsyncGenerator[Delta, None]:
        """One choice's deltas; ends after the one that has `finish`."""
        request = generation.requests[index]
        output = ChoiceOutput(index, request, generation.given.stop, self.tokenizer)
        last_s: float | None = None
        num_tokens = 0
        async with aclosing(self._backend.generate(request)) as events:
            while (event := await _next_event(events, request.deadline_unix_s)) is not None:
                delta = output.take(event)
                now = generation.trace.mark_token()
                self.metrics.token(None if last_s is None else now - last_s)
                if last_s is None:
                    self.metrics.prefix_lookup(len(request.prompt_ids), event.cached_tokens)
                last_s = now
                num_tokens += len(delta.token_ids)
                if delta.finish is not None:
                    self.metrics.choice_finished(delta.finish, num_tokens)
                    yield delta
                    return
                yield delta
        raise MemberLostError(f"request {request.id}: its tokens ended before the last one; send it again")


async def _next_event(events: TokenStream, deadline_unix_s: float | None) -> TokenEvent | None:
    """The next event, None after the last; waits no longer than until the deadline."""
    if deadline_unix_s is None:
        return await anext(events, None)
    try:
        async with asyncio.timeout(deadline_unix_s - time.time()):
            return await anext(events, None)
    except TimeoutError as error:
        raise DeadlineExceededError("the request's deadline passed before its last token; allow more time") from error


async def _next_delta(deltas: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(deltas, None)


async def _merge(choices: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Deltas of several choices as they come; the first error ends them all."""
    pending = {asyncio.create_task(_next_delta(choice)): choice for choice in choices}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                choice = pending.pop(task)
                delta = task.result()
                if delta is not None:
                    pending[asyncio.create_task(_next_delta(choice))] = choice
                    yield delta
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for choice in choices:
            await choice.aclose()
