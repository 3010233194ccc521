"""HTTP responses that stop working the moment their client leaves, whole or as server-sent events."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Protocol

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.error_replies import ErrorReply, error_reply
from deploy.schema import ErrorBody, ErrorResponse
from router.errors import MoefleetError

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx holds streams back otherwise.
    (b"x-accel-buffering", b"no"),
]


def event(model: BaseModel) -> bytes:
    """One event; fields that were not set are left out."""
    return b"data: " + model.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def error_body(reply: ErrorReply) -> bytes:
    """OpenAI's error object."""
    body = ErrorBody(message=reply.message, type=reply.type, param=reply.param, code=reply.code)
    return ErrorResponse(error=body).model_dump_json().encode()


def error_response(reply: ErrorReply) -> Response:
    """An error as a whole response."""
    headers = {}
    if reply.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(reply.retry_after_s)))
    if reply.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(reply), status_code=reply.status, headers=headers, media_type="application/json")


class ReplyEnd(Protocol):
    """Told how a reply ended."""

    def client_left(self) -> None:
        """The client closed its connection before the reply was complete."""
        ...

    def error(self, code: str) -> None:
        """The reply is an error, or ended with one."""
        ...


class JsonReply(Response):
    """A whole reply, made while the client is watched: when it leaves, the work is cancelled."""

    def __init__(self, work: Callable[[], Coroutine[None, None, BaseModel]], on_end: ReplyEnd) -> None:
        super().__init__(media_type="application/json")
        self._work = work
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the work and send its result or its error."""
        await until_disconnect(receive, self._respond(scope, receive, send), self._on_end.client_left)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = (await self._work()).model_dump_json(exclude_unset=True).encode()
        except MoefleetError as error:
            reply = error_reply(error)
            self._on_end.error(reply.code)
            await error_response(reply)(scope, receive, send)
            return
        await Response(body, media_type="application/json")(scope, receive, send)


class EventStream(Response):
    """A stream of events. An error before the first is a plain error response; a later one is the last event.

    The first event decides the status, so nothing is sent before it is there.
    """

    def __init__(self, events: Callable[[], AsyncGenerator[bytes, None]], on_end: ReplyEnd) -> None:
        super().__init__(media_type="text/event-stream")
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        await until_disconnect(receive, self._respond(scope, receive, send), self._on_end.client_left)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events()) as events:
                async for data in _ending_with_done(events):
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except MoefleetError as error:
            reply = error_reply(error)
            self._on_end.error(reply.code)
            if not started:
                await error_response(reply)(scope, receive, send)
                return
            await send(
                {"type": "http.response.body", "body": b"data: " + error_body(reply) + b"\n\n", "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _ending_with_done(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for data in events:
        yield data
    yield b"data: [DONE]\n\n"


async def until_disconnect(
    receive: Receive, work: Coroutine[None, None, None], client_left: Callable[[], None]
) -> None:
    """Run `work`; cancel it as soon as the client has gone, and say so.

    The request's body must have been read: what `receive` then gives next is the disconnect.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            client_left()
            task.cancel()
            await asyncio.wait((task,))
        if not task.cancelled():
            task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
