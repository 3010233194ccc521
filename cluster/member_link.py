"""One end of the stream between a gateway and a member: frames over a socket whose two ends have proven the token.

A frame is its length in four bytes and a message; one without a message only says that its sender is alive. What comes
is handed on within the event loop's turn that read it, and what is sent goes out at once: at each step of a member a
thread that wakes for it takes its core from one that computes.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast

from typing_extensions import override

from cluster.security import HELLO_TIMEOUT_S, Exchange, client_exchange, server_exchange
from router.errors import CorruptDataError

logger = logging.getLogger(__name__)

_HEADER_BYTES: Final = 4
_MAX_GREETED: Final = 64
"""Connections at once that have not proven the token yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """Bounds of one link; both ends must beat within the other's silence_s."""

    max_frame_bytes: int = 16 << 20
    beat_s: float = 1.0
    """An end that sent nothing for this long sends an empty frame."""
    silence_s: float = 5.0
    """An end that sends nothing for this long is lost: frozen, or cut off without a word."""
    close_s: float = 1.0
    """What was sent before the end has this long to go out."""


class LinkEnd(Protocol):
    """Who uses a link. Called on the event loop."""

    def take(self, frame: bytes) -> None:
        """Take a message in.

        Raises:
            CorruptDataError: it is damaged or makes no sense; `corrupt` is told.
        """
        ...

    def corrupt(self, text: str) -> None:
        """The other end does not keep to the protocol; nothing more of it is handed on."""
        ...

    def lost(self, reason: str) -> None:
        """The link is down; the last call."""
        ...


class MemberLink(asyncio.Protocol):
    """Frames in and out of one connection. Lives on the event loop.

    Args:
        prove: this end's side of the proofs, to the peer of that name.
        welcome: called with the link once the other end has proven the token; returns who uses it.
        refused: called with the reason when the connection ends before that.
    """

    def __init__(
        self,
        prove: "Callable[[MemberLink, str], Exchange]",
        welcome: "Callable[[MemberLink], LinkEnd]",
        refused: "Callable[[MemberLink, str], None]",
        limits: LinkLimits,
    ) -> None:
        self._prove = prove
        self._welcome = welcome
        self._refused = refused
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._exchange: Exchange | None = None
        self._wanted = 0
        """Bytes that the proofs go on with."""
        self._end: LinkEnd | None = None
        """None until the other end has proven the token."""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = bytearray()
        self._waiting: list[bytes] = []
        self._has_room = True
        self._num_unheard = 0
        """Beats of ours since anything came. A beat that is late counts once: the machine may have stood still, and the
        other end with it."""
        self._has_sent = True
        self._is_over = False
        """Nothing more is handed on."""
        self._reason = ""

    @property
    def num_waiting(self) -> int:
        """Frames that the network does not take yet."""
        return len(self._waiting)

    def send(self, frames: Sequence[bytes]) -> None:
        """Send messages in order; while the network takes no more they wait."""
        self._waiting += frames
        if self._has_room:
            self._write()

    def close(self) -> None:
        """End the link in order: what was sent still goes out, for a moment."""
        self._is_over = True
        if self._transport is not None and not self._transport.is_closing():
            if self._waiting:
                self._write()
            self._transport.close()
            self._wait(self._limits.close_s, self._transport.abort)

    def abort(self, reason: str) -> None:
        """End the link at once."""
        self._is_over = True
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As `asyncio.Protocol`."""
        # Ray's loops are uvloop's, whose transports are of no class of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._wait(HELLO_TIMEOUT_S, lambda: self.abort("it did not prove the cluster token in time"))
        self._exchange = self._prove(self, str(transport.get_extra_info("peername") or "the peer"))
        out, self._wanted = next(self._exchange)
        self._transport.write(out)

    @override
    def data_received(self, data: bytes) -> None:
        """As `asyncio.Protocol`."""
        self._num_unheard = 0
        self._buffer += data
        try:
            if self._end is None:
                self._go_on_proving()
            if self._end is not None:
                self._hand_on(self._end)
        except CorruptDataError as error:
            if self._end is None:
                self.abort(str(error))
            else:
                self._is_over = True
                self._end.corrupt(str(error))

    def _go_on_proving(self) -> None:
        """Answer what has come; behind the last proof the link is up."""
        assert self._exchange is not None
        assert self._transport is not None
        while len(self._buffer) >= self._wanted:
            given = bytes(self._buffer[: self._wanted])
            del self._buffer[: self._wanted]
            try:
                out, self._wanted = self._exchange.send(given)
            except StopIteration:
                self._end = self._welcome(self)
                self._beat()
                return
            self._transport.write(out)

    def _hand_on(self, end: LinkEnd) -> None:
        """Give out every whole frame."""
        at, size = 0, len(self._buffer)
        while size - at >= _HEADER_BYTES and not self._is_over:
            begin = at + _HEADER_BYTES
            length = int.from_bytes(self._buffer[at:begin], "little")
            if length > self._limits.max_frame_bytes:
                limit = self._limits.max_frame_bytes
                raise CorruptDataError(f"a message of {length} bytes exceeds the limit of {limit}")
            if size - begin < length:
                break
            at = begin + length
            if length:
                end.take(bytes(self._buffer[begin:at]))
        del self._buffer[:at]

    @override
    def pause_writing(self) -> None:
        """As `asyncio.Protocol`."""
        self._has_room = False

    @override
    def resume_writing(self) -> None:
        """As `asyncio.Protocol`."""
        self._has_room = True
        if self._waiting:
            self._write()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """As `asyncio.Protocol`."""
        self._is_over = True
        assert self._timer is not None
        self._timer.cancel()
        reason = self._reason or (str(exc) if exc is not None else "")
        if self._end is not None:
            self._end.lost(reason or "it ended the stream")
        else:
            self._refused(self, reason or "it closed the connection; do the cluster tokens agree?")

    def _write(self) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._has_sent = True
            frames = self._waiting
            self._transport.write(b"".join(len(one).to_bytes(_HEADER_BYTES, "little") + one for one in frames))
        self._waiting.clear()

    def _beat(self) -> None:
        """Now and then: say that this end is alive, and see whether the other one is."""
        silent_s = self._num_unheard * self._limits.beat_s
        if self._is_over:
            return
        if silent_s >= self._limits.silence_s:
            self.abort(f"it said nothing for {silent_s:.3g} s")
            return
        if not self._has_sent and self._has_room:
            self.send([b""])
        self._has_sent = False
        self._num_unheard += 1
        self._wait(self._limits.beat_s, self._beat)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something later, in place of what was to be done."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)


async def connect_link(
    address: str, token: str, welcome: Callable[[MemberLink], LinkEnd], limits: LinkLimits
) -> MemberLink:
    """A link to host:port, whose listener has proven the token.

    Raises:
        OSError: nobody listens there.
        CorruptDataError: who does holds another token, or is no member.
    """
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[str] = loop.create_future()

    def up(link: MemberLink) -> LinkEnd:
        if opened.done():
            raise CorruptDataError("nobody waits for it any more")
        opened.set_result("")
        return welcome(link)

    def refused(link: MemberLink, reason: str) -> None:
        if not opened.done():
            opened.set_result(reason)

    host, _, port = address.rpartition(":")
    _, link = await loop.create_connection(
        lambda: MemberLink(lambda _, peer: client_exchange(token, peer), up, refused, limits),
        host.strip("[]"),
        int(port),
    )
    try:
        reason = await opened
    except asyncio.CancelledError:
        link.abort("nobody waits for it any more")
        raise
    if reason:
        raise CorruptDataError(f"{address}: {reason}")
    return link


class LinkListener:
    """Lets in who proves the token. Lives on the event loop.

    Args:
        token: the cluster token.
        welcome: called with each link that is up; returns who uses it.
    """

    def __init__(self, token: str, welcome: Callable[[MemberLink], LinkEnd], limits: LinkLimits) -> None:
        self._token = token
        self._welcome = welcome
        self._limits = limits
        self._greeted: dict[MemberLink, None] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int = 0) -> int:
        """Listen on an address of the node's interface -> the port.

        Args:
            port: 0 takes a free one.

        Raises:
            OSError: host and port cannot be listened on.
        """
        self._server = await asyncio.get_running_loop().create_server(self._new_link, host, port)
        found = self._server.sockets[0].getsockname()[1]
        assert isinstance(found, int)
        return found

    def close(self) -> None:
        """Listen no more; links that are up stay."""
        if self._server is not None:
            self._server.close()
        for link in tuple(self._greeted):
            link.abort("this member ends")

    def _new_link(self) -> MemberLink:
        return MemberLink(self._prove, self._let_in, self._refuse, self._limits)

    def _prove(self, link: MemberLink, peer: str) -> Exchange:
        if len(self._greeted) >= _MAX_GREETED:
            # A gateway proves it within a round trip; who holds all places is not to keep one out.
            oldest = next(iter(self._greeted))
            del self._greeted[oldest]
            oldest.abort(f"it had not proven the cluster token when {_MAX_GREETED} others had come")
        self._greeted[link] = None
        return server_exchange(self._token, peer)

    def _let_in(self, link: MemberLink) -> LinkEnd:
        self._greeted.pop(link, None)
        return self._welcome(link)

    def _refuse(self, link: MemberLink, reason: str) -> None:
        self._greeted.pop(link, None)
        logger.warning("a connection is not let in: %s", reason)
