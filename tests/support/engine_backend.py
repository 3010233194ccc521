"""One engine of this process as a back end of the gateway: no members between them."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected, TicketReady
from cluster.executor import Ranks
from cluster.resolve import ResolvedEngine, resolve_engine
from cluster.spawn import LocalReplica
from cluster.ticket import ticket_maker
from router.load import MemberLoad
from router.request import MemberId, Request, RequestId, TokenEvent
from tests.support.events import one_by_one

_MEMBER = MemberId("engine")
Queue = asyncio.Queue[TokenEvent | Rejected]


class EngineBackend:
    """Brings an engine's events to the event loop of its requests."""

    def __init__(self, engine: ResolvedEngine, ranks: Ranks) -> None:
        self._queues: dict[RequestId, tuple[asyncio.AbstractEventLoop, Queue]] = {}
        outlets = EngineOutlets(
            on_events=self._deliver,
            make_ticket=ticket_maker(_MEMBER, engine.kv_layout(), lambda _: ()),
            on_failure=lambda _: None,
        )
        self.engine = Engine(engine.scheduler_config(), ranks, outlets, member_id=_MEMBER)
        self.engine.start()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Serve a request; closing aborts it."""
        queue: Queue = asyncio.Queue()
        self._queues[request.id] = (asyncio.get_running_loop(), queue)
        self.engine.submit(request)
        ended = False
        try:
            while not ended:
                event = await queue.get()
                if isinstance(event, Rejected):
                    raise event.error
                ended = event.finish is not None
                yield event
        finally:
            del self._queues[request.id]
            if not ended:
                self.engine.abort(request.id)

    async def health(self) -> None:
        """Raise what made the engine fail."""
        if self.engine.failure is not None:
            raise self.engine.failure

    def check_room(self, tenant: str, priority: int) -> None:
        """There is always room."""

    def waiting(self) -> Mapping[int, int]:
        """Nobody waits here."""
        return {}

    def loads(self) -> tuple[MemberLoad, ...]:
        """The engine's own."""
        return (self.engine.load(),)

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in one_by_one(events):
            assert not isinstance(event, TicketReady)
            found = self._queues.get(event.request_id)
            if found is not None:
                loop, queue = found
                loop.call_soon_threadsafe(queue.put_nowait, event)


@contextmanager
def engine_backend(model: Path) -> Iterator[EngineBackend]:
    """A float32 engine on one rank."""
    config = EngineConfig(model=model, dtype="float32", max_model_len=256, kv_memory_bytes=32 << 20, threads=1)
    engine = resolve_engine(config)
    with LocalReplica(engine) as replica:
        backend = EngineBackend(engine, replica.ranks)
        try:
            yield backend
        finally:
            backend.engine.halt()
