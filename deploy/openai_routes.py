"""The HTTP API: OpenAI's chat and text completions, models, health and metrics."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from deploy.chat import ChatPrompt
from deploy.error_replies import ErrorReply, error_reply
from deploy.generation import Generation, GenerationService, UsageCount
from deploy.http_guard import ApiKey, KeyCheck, KeyRing, RoomCheck, SizeLimit
from deploy.metrics import CONTENT_TYPE, GatewayMetrics
from deploy.openai_input import chat_input, completion_input, parse_body
from deploy.openai_output import (
    ChatCollector,
    ChatOutput,
    CompletionOutput,
    ReplyOptions,
    chat_chunk,
    chat_usage_chunk,
    completion_reply,
    join_choices,
    usage_reply,
)
from deploy.schema import (
    ChatReply,
    ChatRequest,
    CompletionChoice,
    CompletionReply,
    CompletionRequest,
    ModelCard,
    ModelList,
    SamplingFields,
)
from deploy.sse import EventStream, JsonReply, error_response, event
from router.errors import MoefleetError, UnknownModelError

_GENERATING: Final = ("/v1/chat/completions", "/v1/completions")
"""The paths that ask for room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """How the HTTP API is served."""

    api_keys: Sequence[ApiKey] = ()
    """Where there are any, everything but /health needs one."""
    max_body_bytes: int = 16 * 2**20
    request_timeout_s: float | None = None
    """A request that takes longer is ended with 504; None waits as long as the client does."""
    body_timeout_s: float = 75.0
    """A body that takes longer to come is refused: what has come of it is held in memory."""
    split_reasoning: bool = True
    """Give `<think>` text as `reasoning`; otherwise it stays in the content."""


class _CountedEnd:
    """Counts how replies ended."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics

    def client_left(self) -> None:
        """The client closed its connection before the reply was complete."""
        self._metrics.client_left()

    def error(self, code: str) -> None:
        """The reply is an error, or ended with one."""
        self._metrics.error("http", code)


class OpenAiApi:
    """The routes' functions; one service and one config."""

    def __init__(self, service: GenerationService, config: HttpConfig) -> None:
        self._service = service
        self._config = config
        self._end = _CountedEnd(service.metrics)

    async def chat(self, request: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        body = parse_body(ChatRequest, await request.body())
        given = chat_input(body, tenant=_tenant(request), deadline_unix_s=self._deadline())
        generation = await self._service.prepare(given, prefix="chatcmpl")
        options = ReplyOptions(
            logprobs=given.sampling.logprobs is not None,
            tools=given.prompt.tools if isinstance(given.prompt, ChatPrompt) else (),
            thinking=generation.thinking and self._config.split_reasoning,
            return_token_ids=bool(body.return_token_ids),
            include_usage=_include_usage(body),
        )
        if body.stream:
            return EventStream(lambda: self._chat_events(generation, options), self._end)
        return JsonReply(lambda: self._chat_reply(generation, options), self._end)

    async def completions(self, request: HttpRequest) -> Response:
        """POST /v1/completions."""
        body = parse_body(CompletionRequest, await request.body())
        given = completion_input(body, tenant=_tenant(request), deadline_unix_s=self._deadline())
        generation = await self._service.prepare(given, prefix="cmpl")
        options = ReplyOptions(
            logprobs=body.logprobs is not None,
            return_token_ids=bool(body.return_token_ids),
            include_usage=_include_usage(body),
        )
        if body.stream:
            return EventStream(lambda: self._completion_events(generation, options), self._end)
        return JsonReply(lambda: self._completion_reply(generation, options), self._end)

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse(ModelList(data=[self._card()]).model_dump())

    async def model(self, model_id: str) -> Response:
        """GET /v1/models/{id}."""
        card = self._card()
        if model_id != card.id:
            raise UnknownModelError(f"model {model_id[:200]!r} is not served here; use {card.id!r}")
        return JSONResponse(card.model_dump())

    async def health(self) -> Response:
        """GET /health: 200 when requests can be served, 503 and why when not."""
        report = await self._service.health()
        body = {"status": "ok" if report.ready else "unavailable", "reason": report.reason, "members": report.members}
        return JSONResponse(body, status_code=200 if report.ready else 503)

    async def serve_health(self) -> Response:
        """GET /-/healthz: as Serve's proxies answer it, for KubeRay, which asks the port of the serving pods."""
        ready = (await self._service.health()).ready
        return PlainTextResponse("success" if ready else "unavailable", status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(self._service.scrape(), media_type=CONTENT_TYPE)

    async def _chat_reply(self, generation: Generation, options: ReplyOptions) -> ChatReply:
        usage = UsageCount(generation)
        collector = ChatCollector(generation, options, self._service.tokenizer)
        async with aclosing(self._service.stream(generation)) as deltas:
            async for delta in deltas:
                usage.add(delta)
                collector.take(delta)
        return collector.reply(usage)

    async def _chat_events(self, generation: Generation, options: ReplyOptions) -> AsyncGenerator[bytes, None]:
        usage = UsageCount(generation)
        outputs = [ChatOutput(options, self._service.tokenizer) for _ in generation.requests]
        begun: set[int] = set()
        async with aclosing(self._service.stream(generation)) as deltas:
            async for delta in deltas:
                usage.add(delta)
                added = outputs[delta.choice].take(delta)
                first = delta.choice not in begun
                if first or not added.is_empty:
                    begun.add(delta.choice)
                    yield event(chat_chunk(generation, delta.choice, added, options=options, first=first))
        if options.include_usage:
            yield event(chat_usage_chunk(generation, usage))

    async def _completion_reply(self, generation: Generation, options: ReplyOptions) -> CompletionReply:
        usage = UsageCount(generation)
        outputs = self._completion_outputs(generation, options)
        parts: list[list[CompletionChoice]] = [[] for _ in outputs]
        async with aclosing(self._service.stream(generation)) as deltas:
            async for delta in deltas:
                usage.add(delta)
                parts[delta.choice].append(outputs[delta.choice].take(delta))
        return completion_reply(generation, [join_choices(each) for each in parts], usage_reply(usage))

    async def _completion_events(self, generation: Generation, options: ReplyOptions) -> AsyncGenerator[bytes, None]:
        usage = UsageCount(generation)
        outputs = self._completion_outputs(generation, options)
        begun: set[int] = set()
        async with aclosing(self._service.stream(generation)) as deltas:
            async for delta in deltas:
                usage.add(delta)
                choice = outputs[delta.choice].take(delta)
                wanted = choice.text or choice.finish_reason or choice.logprobs or choice.token_ids
                if wanted or delta.choice not in begun:
                    begun.add(delta.choice)
                    reply = completion_reply(generation, [choice], None)
                    if options.include_usage:
                        reply.usage = None
                    yield event(reply)
        if options.include_usage:
            yield event(completion_reply(generation, [], usage_reply(usage)))

    def _completion_outputs(self, generation: Generation, options: ReplyOptions) -> list[CompletionOutput]:
        tokenizer = self._service.tokenizer
        return [CompletionOutput(generation, index, options, tokenizer) for index in range(len(generation.requests))]

    def _card(self) -> ModelCard:
        model = self._service.model
        return ModelCard(id=model.name, created=model.created_unix_s, max_model_len=model.max_model_len)

    def _deadline(self) -> float | None:
        timeout_s = self._config.request_timeout_s
        return None if timeout_s is None else time.time() + timeout_s


def create_app(service: GenerationService, config: HttpConfig) -> FastAPI:
    """Make the HTTP application. Routes that are not listed here do not exist, documentation pages among them."""
    app = FastAPI(title="MoEFleet", docs_url=None, redoc_url=None, openapi_url=None)
    api = OpenAiApi(service, config)
    app.add_api_route(_GENERATING[0], api.chat, methods=["POST"], response_model=None)
    app.add_api_route(_GENERATING[1], api.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model_id:path}", api.model, methods=["GET"], response_model=None)
    app.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/-/healthz", api.serve_health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.metrics, methods=["GET"], response_model=None)

    async def refuse(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, MoefleetError)
        reply = error_reply(error)
        service.metrics.error("http", reply.code)
        return error_response(reply)

    app.add_exception_handler(MoefleetError, refuse)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _nobody_there)
    app.add_exception_handler(Exception, _internal_error)
    _guard(app, service, config)
    return app


def _guard(app: FastAPI, service: GenerationService, config: HttpConfig) -> None:
    """Let requests pass size, key and room before a route; the last added is the outermost."""
    app.add_middleware(
        RoomCheck,
        paths=_GENERATING,
        check_room=service.check_room,
        on_refused=lambda code: service.metrics.error("http", code),
        body_timeout_s=config.body_timeout_s,
    )
    app.add_middleware(KeyCheck, keys=KeyRing(config.api_keys))
    app.add_middleware(SizeLimit, max_body_bytes=config.max_body_bytes)


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reply = ErrorReply(
        status=error.status_code,
        grpc_code="INTERNAL",
        type="invalid_request_error",
        code="not_found" if error.status_code == 404 else "bad_request",
        message=f"{error.detail}; see /v1/models, /v1/completions and /v1/chat/completions",
    )
    return error_response(reply)


async def _nobody_there(_: HttpRequest, __: Exception) -> Response:
    """The client left while its body was read: nobody sees this, and nothing was begun."""
    return Response(status_code=400)


async def _internal_error(_: HttpRequest, __: Exception) -> Response:
    return error_response(error_reply(MoefleetError()))


def _tenant(request: HttpRequest) -> str:
    return str(request.scope["state"]["tenant"])


def _include_usage(body: SamplingFields) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage
