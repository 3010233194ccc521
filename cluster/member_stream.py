"""The events of one request on one member, as the gateway takes them."""

import asyncio
from collections import deque
from collections.abc import Callable

from cluster.plan import KvTicket
from router.errors import MemberLostError, MoefleetError, OverloadedError
from router.request import RequestId, TokenEvent

MemberEvent = TokenEvent | KvTicket


class MemberStream:
    """The events of one request on one member, for one reader.

    Tokens, and at the end of a prefill a ticket, parts of it before.
    """

    def __init__(
        self,
        request_id: RequestId,
        handle: int,
        *,
        abort: Callable[[], None],
        release: Callable[[str], None],
        max_events: int,
    ) -> None:
        self.request_id = request_id
        self.handle = handle
        """Its name on the connection."""
        self._abort = abort
        self._release = release
        self._events: deque[MemberEvent | MoefleetError] = deque()
        self._reader: asyncio.Future[None] | None = None
        """Waits for an event."""
        self._max_events = max_events
        self._closed = False
        self._cut = False
        self._lost = False
        self._last_taken = False
        self._ticket_taken = False
        self._ended = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Nobody reads it any more."""
        return self._closed

    @property
    def owns_ticket(self) -> bool:
        """Its reader has taken the ticket or a part of it, and is the one to release it."""
        return self._ticket_taken

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
        if self._closed or (self._last_taken and not self._events):
            raise StopAsyncIteration
        while not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        event = self._events.popleft()
        if isinstance(event, MoefleetError):
            self._last_taken = True
            raise event
        self._ticket_taken |= isinstance(event, KvTicket)
        self._last_taken = not event.partial if isinstance(event, KvTicket) else event.finish is not None
        return event

    def close(self) -> None:
        """Want no more events: what still runs is aborted, and a ticket that nobody has taken is released."""
        if self._closed:
            return
        self._closed = True
        if not self._ended.is_set():
            self._abort()
        for event in self._events:
            if isinstance(event, KvTicket) and not self._ticket_taken:
                self._release(event.id)
        self._events.clear()

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
        if not last and len(self._events) >= self._max_events:
            text = f"{self.request_id}: its reader is {self._max_events} tokens behind; read faster"
            event = OverloadedError(text, retry_after_s=1.0)
            self._cut = True
            self._abort()
        self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
