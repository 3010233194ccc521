"""The gateway's end of the stream to one member: submits requests, sorts events by request, notices a lost member.

Lives on one event loop. The stream is opened again, with growing pauses, until the client is closed.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.load_codec import read_cache, read_load
from cluster.member_codec import (
    MemberHello,
    SubmitMode,
    expect_message,
    read_frame,
    read_hello,
    read_rejection,
    read_step,
    read_ticket,
    submit_message,
)
from cluster.member_link import LinkLimits, MemberLink, connect_link
from cluster.member_stream import MemberEvent, MemberStream
from cluster.members import MemberInfo
from cluster.plan import KvTicket
from cluster.protos import member_pb2 as pb
from cluster.security import check_token
from router.errors import CorruptDataError, MemberLostError, MoefleetError, OverloadedError
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, RequestId

logger = logging.getLogger(__name__)

_CANCEL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Bounds of one stream."""

    link: LinkLimits = field(default_factory=LinkLimits)
    max_queued_events: int = 4096
    """Events of one request that its reader may lag behind; then the request is aborted."""
    max_queued_messages: int = 4096
    """Messages to the member; then requests are refused."""
    hello_timeout_s: float = 5.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 2.0


class MemberClient:
    """Keeps one stream to one member.

    Args:
        info: the member, as the directory lists it; another that answers at its address is not taken for it.
        token: the cluster token.
        on_load: called with each load report.
        on_cache: called with changes of its prefix cache; answers False where earlier ones are missing.
        on_lost: called when the stream has ended, before its requests learn of it.
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
    ) -> None:
        self.info = info
        self._token = check_token(token)
        self._on_load = on_load
        self._on_cache = on_cache
        self._on_lost = on_lost
        self._limits = limits or ClientLimits()
        self._hello: MemberHello | None = None
        self._resyncing = False
        self._session: _Session | None = None
        self._refused = ""
        """Why the latest one was that is not what we look for."""
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

    def submit(
        self,
        request: Request,
        *,
        mode: SubmitMode,
        ticket: KvTicket | None = None,
        expected: MemberStream | None = None,
    ) -> MemberStream:
        """Send a request; its refusal comes through the stream.

        Args:
            expected: from `expect`: its events come there, if it has not ended.

        Raises:
            MemberLostError: the stream is down.
            OverloadedError: too much waits to be sent.
        """
        stream = self._stream(request.id, expected)
        self._send(submit_message(stream.handle, request, mode, ticket))
        return stream

    def expect(
        self, request_id: RequestId, hashes: Sequence[int], ticket: KvTicket, expected: MemberStream | None = None
    ) -> MemberStream:
        """Have a member fetch what is prefilled of a request elsewhere, which `submit` sends later.

        Args:
            hashes: of the blocks of the member's size that the ticket covers.
            expected: what the call before has returned.

        Raises:
            MemberLostError, OverloadedError: as `submit`.
        """
        stream = self._stream(request_id, expected)
        self._send(expect_message(stream.handle, request_id, hashes, ticket))
        return stream

    def _stream(self, request_id: RequestId, known: MemberStream | None) -> MemberStream:
        """The one that is known, if it still lives, or a new one."""
        if known is not None and self._streams.get(known.handle) is known:
            return known
        if self._session is None or self._hello is None:
            raise MemberLostError(
                f"member {self.info.member_id} at {self.info.address} is not connected; send it again"
            )
        if self._session.num_waiting >= self._limits.max_queued_messages:
            raise OverloadedError(
                f"{self._session.num_waiting} messages wait for {self.info.member_id}", retry_after_s=1.0
            )
        handle = self._next_handle
        self._next_handle += 1
        stream = MemberStream(
            request_id,
            handle,
            abort=lambda: self._abort(handle),
            release=self.release_ticket,
            max_events=self._limits.max_queued_events,
        )
        self._streams[handle] = stream
        self._request_ids[handle] = request_id
        return stream

    def release_ticket(self, ticket_id: str) -> None:
        """Tell the member that nobody needs a ticket any more; a lost member needs no telling."""
        if self._hello is not None:
            self._send(pb.GatewayMessage(release_ticket=pb.ReleaseTicket(ticket_id=ticket_id)))

    def _abort(self, handle: int) -> None:
        if handle in self._streams:
            self._send(pb.GatewayMessage(abort=pb.Abort(handle=handle)))

    def _send(self, message: pb.GatewayMessage) -> None:
        if self._session is not None:
            self._session.send(message)

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        finally:
            self._lose("this gateway ended its stream")

    async def _keep_connected(self) -> None:
        backoff_s = self._limits.first_backoff_s
        while True:
            try:
                reason = await self._serve()
            except OSError as error:
                reason = str(error)
            except CorruptDataError as error:
                reason = str(error)
                self._refuse(reason)
            if self._hello is not None:
                backoff_s = self._limits.first_backoff_s
            self._lose(reason)
            # Gateways of one fleet must not come back in step.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self._limits.max_backoff_s)

    def _refuse(self, reason: str) -> None:
        """Say once why this is not the member that we look for, however often it is tried."""
        if reason != self._refused:
            self._refused = reason
            logger.warning("%s at %s: %s", self.info.member_id, self.info.address, reason)

    async def _serve(self) -> str:
        """One life of the stream; returns why it ended."""
        self._next_handle = 1
        self._session = session = _Session(self._take_hello, self._take)
        try:
            try:
                async with asyncio.timeout(self._limits.hello_timeout_s):
                    await connect_link(self.info.address, self._token, session.opened, self._limits.link)
                    await session.greeted.wait()
            except TimeoutError:
                return f"it said nothing for {self._limits.hello_timeout_s:g} s"
            return await session.ended
        finally:
            self._session = None
            session.close()

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
            self._send(pb.GatewayMessage(resync=pb.Resync()))

    def _take_step(self, step: pb.StepEvents) -> None:
        for handle, event in read_step(step, self._request_ids):
            if event.finish is None:
                self._streams[handle].take(event, last=False)
            else:
                self._finish(handle, event)
        for ready in step.tickets:
            self._take_ticket(ready.handle, read_ticket(ready.ticket))

    def _take_ticket(self, handle: int, ticket: KvTicket) -> None:
        stream = self._streams.get(handle)
        if stream is None or (stream.is_closed and not stream.owns_ticket):
            # Aborted while the ticket was on its way.
            self.release_ticket(ticket.id)
        if not ticket.partial:
            self._finish(handle, ticket)
        elif stream is not None:
            stream.take(ticket, last=False)

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


class _Session:
    """One connection to the member, until it ends.

    Args:
        on_hello: takes the member's first message.
        on_message: takes each other one.
    """

    def __init__(
        self, on_hello: Callable[[pb.MemberMessage], None], on_message: Callable[[pb.MemberMessage], None]
    ) -> None:
        self.greeted = asyncio.Event()
        """The member has said who it is, or the session has ended."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it ended; CorruptDataError where it did not keep to the protocol."""
        self._on_hello = on_hello
        self._on_message = on_message
        self._link: MemberLink | None = None

    @property
    def num_waiting(self) -> int:
        """Messages that the network does not take yet."""
        return 0 if self._link is None else self._link.num_waiting

    def opened(self, link: MemberLink) -> "_Session":
        """The member has proven the token."""
        self._link = link
        return self

    def send(self, message: pb.GatewayMessage) -> None:
        """Send a message."""
        if self._link is not None:
            self._link.send([message.SerializeToString()])

    def close(self) -> None:
        """End it; nothing more is handed on."""
        if not self.ended.cancel() and not self.ended.cancelled():
            # Nobody may have asked for it.
            self.ended.exception()
        if self._link is not None:
            self._link.close()

    def take(self, frame: bytes) -> None:
        """As `LinkEnd`."""
        if self.ended.done():
            return
        message = read_frame(pb.MemberMessage, frame)
        if message.WhichOneof("kind") == "ended":
            self.lost(message.ended.reason)
        elif self.greeted.is_set():
            self._on_message(message)
        else:
            self._on_hello(message)
            self.greeted.set()

    def corrupt(self, text: str) -> None:
        """As `LinkEnd`."""
        if not self.ended.done():
            self.ended.set_exception(CorruptDataError(text))
        self.greeted.set()

    def lost(self, reason: str) -> None:
        """As `LinkEnd`."""
        if not self.ended.done():
            self.ended.set_result(reason)
        self.greeted.set()
