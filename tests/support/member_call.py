"""Either side of the member stream: a gateway that speaks message by message, and connections without a service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.gateway_connection import GatewayConnection
from cluster.member_link import LinkEnd, LinkLimits, MemberLink
from cluster.protos import member_pb2 as pb
from cluster.security import Exchange, client_exchange


class MemberCall:
    """One connection to a member."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def prove(self, token: str) -> None:
        """Begin as a gateway does."""
        exchange = client_exchange(token, "the member")
        out, wanted = next(exchange)
        try:
            while True:
                self._writer.write(out)
                out, wanted = exchange.send(await self._reader.readexactly(wanted))
        except StopIteration:
            return

    async def read(self) -> pb.MemberMessage:
        """The next message, without those that merely say that the member is alive."""
        while not (length := int.from_bytes(await self._reader.readexactly(4), "little")):
            pass
        return pb.MemberMessage.FromString(await self._reader.readexactly(length))

    async def write(self, message: pb.GatewayMessage) -> None:
        self.write_frame(message.SerializeToString())
        await self._writer.drain()

    def write_frame(self, frame: bytes) -> None:
        self._writer.write(len(frame).to_bytes(4, "little") + frame)

    async def read_end(self) -> str:
        """Read up to the end of the connection; the reason that the member gave."""
        while (message := await self.read()).WhichOneof("kind") != "ended":
            pass
        assert await self._reader.read() == b"", "bytes behind the end"
        return message.ended.reason

    def done_writing(self) -> None:
        self._writer.write_eof()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            # The member was the first.
            return


@asynccontextmanager
async def calling(address: str, token: str) -> AsyncIterator[MemberCall]:
    host, _, port = address.rpartition(":")
    call = MemberCall(*await asyncio.open_connection(host, int(port)))
    try:
        await call.prove(token)
        yield call
    finally:
        await call.close()


class ConnectionList:
    """Owner of connections without a service."""

    def __init__(self) -> None:
        self.forgotten: list[GatewayConnection] = []

    def take(self, message: pb.GatewayMessage, connection: GatewayConnection) -> None:
        raise AssertionError(f"nobody was to send {message}")

    def forget(self, connection: GatewayConnection) -> None:
        self.forgotten.append(connection)

    def new(self, link: MemberLink, max_messages: int = 8) -> GatewayConnection:
        return GatewayConnection(self, link, max_messages)

    def unlinked(self) -> GatewayConnection:
        """One to nobody; needs a running loop."""
        return self.new(raw_link(self.new, LinkLimits()))


def raw_link(welcome: Callable[[MemberLink], LinkEnd], limits: LinkLimits) -> MemberLink:
    """A link whose other end need not prove anything, not connected; needs a running loop."""

    def prove(link: MemberLink, peer: str) -> Exchange:
        # Up with the first byte.
        yield b"", 1

    return MemberLink(prove, welcome, lambda link, reason: None, limits)
