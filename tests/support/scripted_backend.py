"""A small real back end in this process: it answers every request with a script of tokens."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from router.errors import MoefleetError
from router.load import MemberLoad
from router.request import FinishReason, MemberId, Request, RequestId, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What one request gets."""

    token_ids: tuple[int, ...] = ()
    finish: FinishReason = "stop"
    """Said with the last token that is emitted."""
    delay_s: float = 0.0
    """Before each token."""
    error: MoefleetError | None = None
    """Raised behind the tokens, in place of a finish."""
    cached_tokens: int = 0
    endless: bool = False
    """Repeat the tokens until the client goes."""


def distinct_logprob(token_id: int, *, top: int) -> TokenLogprob:
    """A logprob that names its token: -token_id / 1000, alternatives counting up from it."""
    top_ids = tuple(token_id + each for each in range(top))
    return TokenLogprob(
        logprob=-token_id / 1000, rank=1, top_ids=top_ids, top_logprobs=tuple(-each / 1000 for each in top_ids)
    )


@dataclass(kw_only=True)
class ScriptedBackend:
    """Serves scripts, and remembers which requests came and which were cut off."""

    script: Callable[[Request], Script]
    unhealthy: MoefleetError | None = None
    requests: list[Request] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    running: int = 0

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Play the request's script."""
        self.requests.append(request)
        self.running += 1
        complete = False
        try:
            async for event in self._events(request, self.script(request)):
                complete = event.finish is not None
                yield event
            complete = True
        finally:
            self.running -= 1
            if not complete:
                self.aborted.append(request.id)

    async def _events(self, request: Request, script: Script) -> AsyncGenerator[TokenEvent, None]:
        index = 0
        limit = request.sampling.max_tokens
        tokens = script.token_ids
        while index < limit and (script.endless or index < len(tokens)):
            await asyncio.sleep(script.delay_s)
            last = not script.endless and index == len(tokens) - 1 and script.error is None
            finish = script.finish if last else "length" if index == limit - 1 else None
            yield self._event(request, index, tokens[index % len(tokens)], finish, script)
            index += 1
        if script.error is not None:
            raise script.error

    def _event(
        self, request: Request, index: int, token_id: int, finish: FinishReason | None, script: Script
    ) -> TokenEvent:
        sampling = request.sampling
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if index == 0 and sampling.prompt_logprobs is not None:
            rest = request.prompt_ids[1:]
            prompt_logprobs = (None, *(distinct_logprob(each, top=sampling.prompt_logprobs) for each in rest))
        return TokenEvent(
            request_id=request.id,
            index=index,
            token_id=token_id,
            finish=finish,
            logprob=None if sampling.logprobs is None else distinct_logprob(token_id, top=sampling.logprobs),
            cached_tokens=script.cached_tokens if index == 0 else 0,
            prompt_logprobs=prompt_logprobs,
        )

    async def health(self) -> None:
        """Raise what the test set."""
        if self.unhealthy is not None:
            raise self.unhealthy

    def check_room(self, tenant: str, priority: int) -> None:
        """There is always room."""

    def waiting(self) -> Mapping[int, int]:
        """Nobody waits here."""
        return {}

    def loads(self) -> tuple[MemberLoad, ...]:
        """One member with a quarter of its blocks in use."""
        member = MemberLoad(
            member_id=MemberId("member-0"),
            role="mixed",
            running_requests=self.running,
            max_requests=8,
            free_blocks=75,
            total_blocks=100,
        )
        return (member,)
