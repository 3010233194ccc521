"""The gateway's end of the stream to one member: submits requests, sorts events by request, notices a lost member.

Lives on one event loop. The stream is opened again, with growing pauses, until the client is closed.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from cluster.load_codec import read_cache, read_load
from cluster.member_codec import (
    MemberHello,
    SubmitMode,
    read_hello,
    read_rejection,
    read_step,
    read_ticket,
    submit_message,
)
from cluster.members import MemberInfo
from cluster.plan import KvTicket
from cluster.protos import member_pb2 as pb
from cluster.protos.member_pb2_grpc import MemberStub
from cluster.security import check_token, token_metadata
from router.errors import CorruptDataError, MemberLostError, MoefleetError, OverloadedError
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, RequestId, TokenEvent

logger = logging.getLogger(__name__)

_CANCEL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Bounds of one stream."""

    max_message_bytes: int = 16 << 20
    max_queued_events: int = 4096
    """Events of one request that its reader may lag behind; then the request is aborted."""
    max_queued_messages: int = 4096
    """Messages to the member; then requests are refused."""
    hello_timeout_s: float = 5.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 2.0


MemberEvent = TokenEvent | KvTicket


class MemberStream:
    """The events of one request on one member: tokens, and a ticket at the end of a prefill."""

    def __init__(
        self,
        request_id: RequestId,
        *,
        abort: Callable[[], None],
        release: Callable[[str], None],
        max_events: int,
    ) -> None:
        self.request_id = request_id
        self._abort = abort
        self._release = release
        self._queue: asyncio.Queue[MemberEvent | MoefleetError] = asyncio.Queue()
        self._max_events = max_events
        self._closed = False
        self._cut = False
        self._lost = False
        self._last_taken = False
        self._ended = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Nobody reads it any more."""
        return self._closed

    @property
    def lost(self) -> bool:
        """It ended because the member was lost, and not by the member's word."""
        return self._lost

    def __aiter__(self) -> "MemberStream":
        return self

    async def __anext__(self) -> MemberEvent:
        """The next event; ends behind a last token, or behind a ticket.

        Raises:
            MemberLostError: the member is gone.
            MoefleetError: the member refused the request, or we read too slowly.
        """
        if self._closed or (self._last_taken and self._queue.empty()):
            raise StopAsyncIteration
        event = await self._queue.get()
        if isinstance(event, MoefleetError):
            self._last_taken = True
            raise event
        self._last_taken = not isinstance(event, TokenEvent) or event.finish is not None
        return event

    def close(self) -> None:
        """Want no more events: what still runs is aborted, and a ticket that nobody has taken is released."""
        if self._closed:
            return
        self._closed = True
        if not self._ended.is_set():
            self._abort()
        while not self._queue.empty():
            event = self._queue.get_nowait()
            if isinstance(event, KvTicket):
                self._release(event.id)

    async def aclose(self) -> None:
        """As `close`."""
        self.close()

    async def ended(self, timeout_s: float) -> bool:
        """Wait until the member has sent the request's last event or is lost; False after timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def take(self, event: MemberEvent | MoefleetError, *, last: bool) -> None:
        """Queue what came from the member; called by its client."""
        if last:
            self._lost = isinstance(event, MemberLostError)
            self._ended.set()
        if self._closed or self._cut:
            return
        if not last and self._queue.qsize() >= self._max_events:
            text = f"{self.request_id}: its reader is {self._max_events} tokens behind; read faster"
            self._queue.put_nowait(OverloadedError(text, retry_after_s=1.0))
            self._cut = True
            self._abort()
            return
        self._queue.put_nowait(event)


class MemberClient:
    """Keeps one stream to one member.

    Args:
        info: the member, as the directory lists it; another that answers at its address is not taken for it.
        token: the cluster token.
        on_load: called with each load report.
        on_cache: called with changes of its prefix cache; answers False where earlier ones are missing.
        on_lost: called when the stream has ended, before its requests learn of it.
        credentials: TLS; without, the token crosses the network in clear.
    """

    def __init__(
        self,
        info: MemberInfo,
        token: str,
        *,
        on_load: Callable[[MemberLoad], None],
        on_cache: Callable[[CacheEvents], bool],
        on_lost: Callable[[MemberId], None],
        limits: ClientLimits | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.info = info
        self._token = check_token(token)
        self._on_load = on_load
        self._on_cache = on_cache
        self._on_lost = on_lost
        self._limits = limits or ClientLimits()
        self._credentials = credentials
        self._hello: MemberHello | None = None
        self._resyncing = False
        self._outbox: asyncio.Queue[pb.GatewayMessage] = asyncio.Queue()
        self._streams: dict[int, MemberStream] = {}
        self._request_ids: dict[int, RequestId] = {}
        self._next_handle = 1
        self._task: asyncio.Task[None] | None = None

    @property
    def hello(self) -> MemberHello | None:
        """Who answered; None while the stream is down."""
        return self._hello

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """End the stream; its requests get MemberLostError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CANCEL_S)
            self._task = None

    def submit(self, request: Request, *, mode: SubmitMode, ticket: KvTicket | None = None) -> MemberStream:
        """Send a request; its refusal comes through the stream.

        Raises:
            MemberLostError: the stream is down.
            OverloadedError: too much waits to be sent.
        """
        if self._hello is None:
            raise MemberLostError(
                f"member {self.info.member_id} at {self.info.address} is not connected; send it again"
            )
        if self._outbox.qsize() >= self._limits.max_queued_messages:
            raise OverloadedError(f"{self._outbox.qsize()} messages wait for {self.info.member_id}", retry_after_s=1.0)
        handle = self._next_handle
        self._next_handle += 1
        stream = MemberStream(
            request.id,
            abort=lambda: self._abort(handle),
            release=self.release_ticket,
            max_events=self._limits.max_queued_events,
        )
        self._streams[handle] = stream
        self._request_ids[handle] = request.id
        self._outbox.put_nowait(submit_message(handle, request, mode, ticket))
        return stream

    def release_ticket(self, ticket_id: str) -> None:
        """Tell the member that nobody needs a ticket any more; a lost member needs no telling."""
        if self._hello is not None:
            self._outbox.put_nowait(pb.GatewayMessage(release_ticket=pb.ReleaseTicket(ticket_id=ticket_id)))

    def _abort(self, handle: int) -> None:
        if handle in self._streams:
            self._outbox.put_nowait(pb.GatewayMessage(abort=pb.Abort(handle=handle)))

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        finally:
            self._lose("this gateway ended its stream")

    async def _keep_connected(self) -> None:
        backoff_s = self._limits.first_backoff_s
        while True:
            try:
                reason = await self._session()
            except CorruptDataError as error:
                reason = str(error)
            if self._hello is not None:
                backoff_s = self._limits.first_backoff_s
            self._lose(reason)
            # Gateways of one fleet must not come back in step.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self._limits.max_backoff_s)

    async def _session(self) -> str:
        """One life of the stream; returns why it ended."""
        self._outbox = asyncio.Queue()
        self._next_handle = 1
        async with self._channel() as channel:
            call = MemberStub(channel).Connect(metadata=token_metadata(self._token))
            writer = asyncio.create_task(self._write(call))
            try:
                messages = aiter(call)
                async with asyncio.timeout(self._limits.hello_timeout_s):
                    first = await anext(messages, None)
                if first is not None:
                    self._take_hello(first)
                async for message in messages:
                    self._take(message)
                return "it ended the stream"
            except TimeoutError:
                return f"it said nothing for {self._limits.hello_timeout_s:g} s"
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            finally:
                writer.cancel()
                call.cancel()

    def _channel(self) -> grpc.aio.Channel:
        options = [
            ("grpc.max_receive_message_length", self._limits.max_message_bytes),
            ("grpc.max_send_message_length", self._limits.max_message_bytes),
            ("grpc.keepalive_time_ms", 2000),
            ("grpc.keepalive_timeout_ms", 3000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # A new session must not inherit the pause of the one that failed.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.info.address, options=options)
        return grpc.aio.secure_channel(self.info.address, self._credentials, options=options)

    async def _write(self, call: "grpc.aio.StreamStreamCall[pb.GatewayMessage, pb.MemberMessage]") -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The reader sees the same end and tells why.
            logger.debug("%s: cannot write: %s", self.info.member_id, error)

    def _take_hello(self, message: pb.MemberMessage) -> None:
        if message.WhichOneof("kind") != "hello":
            raise CorruptDataError(f"{self.info.address} did not begin with hello; run one release everywhere")
        hello = read_hello(message.hello)
        if (hello.member_id, hello.generation) != (self.info.member_id, self.info.generation):
            raise CorruptDataError(
                f"{self.info.address} is member {hello.member_id} generation {hello.generation}, expected "
                f"{self.info.member_id} generation {self.info.generation}; the directory will tell"
            )
        self._resyncing = False
        self._hello = hello
        logger.info("%s: connected at %s", self.info.member_id, self.info.address)

    def _take(self, message: pb.MemberMessage) -> None:
        match message.WhichOneof("kind"):
            case "step":
                self._take_step(message.step)
            case "load":
                self._on_load(read_load(message.load, member_id=self.info.member_id))
            case "cache":
                self._take_cache(read_cache(message.cache))
            case "rejected":
                self._finish(message.rejected.handle, read_rejection(message.rejected))
            case _:
                raise CorruptDataError(f"unknown message from {self.info.member_id}; run one release everywhere")

    def _take_cache(self, events: CacheEvents) -> None:
        """Pass changes on; when some were lost, ask for a snapshot, once."""
        if self._on_cache(events):
            self._resyncing = False
        elif not self._resyncing:
            self._resyncing = True
            logger.info("%s: cache events are missing before %s", self.info.member_id, events.sequence)
            self._outbox.put_nowait(pb.GatewayMessage(resync=pb.Resync()))

    def _take_step(self, step: pb.StepEvents) -> None:
        for handle, event in read_step(step, self._request_ids):
            if event.finish is None:
                self._streams[handle].take(event, last=False)
            else:
                self._finish(handle, event)
        for ready in step.tickets:
            ticket = read_ticket(ready.ticket)
            if ready.handle not in self._streams or self._streams[ready.handle].is_closed:
                # Aborted while the ticket was on its way.
                self.release_ticket(ticket.id)
            self._finish(ready.handle, ticket)

    def _finish(self, handle: int, last: MemberEvent | MoefleetError) -> None:
        self._request_ids.pop(handle, None)
        stream = self._streams.pop(handle, None)
        if stream is not None:
            stream.take(last, last=True)

    def _lose(self, reason: str) -> None:
        """The stream is down: its requests end at once."""
        was_up, self._hello = self._hello is not None, None
        if was_up:
            logger.warning("%s: stream lost: %s", self.info.member_id, reason)
            self._on_lost(self.info.member_id)
        else:
            logger.debug("%s: not connected: %s", self.info.member_id, reason)
        for handle in tuple(self._streams):
            text = f"member {self.info.member_id} was lost: {reason}; send the request again"
            self._finish(handle, MemberLostError(text))
