"""A real engine that stays up from one request to the next, so that its prefix cache does."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from cluster.config import EngineConfig
from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected
from cluster.engine_stats import EngineStats
from cluster.resolve import resolve_engine
from cluster.spawn import LocalReplica
from cluster.ticket import ticket_maker
from router.load import CacheEvents, MemberLoad
from router.request import MemberId, Request, RequestId, TokenEvent
from tests.support.events import one_by_one

_MEMBER = MemberId("live")


class LiveEngine:
    """Serves requests, any number at a time."""

    def __init__(self, engine: Engine, arrived: SimpleQueue[list[EngineEvent]]) -> None:
        self._engine = engine
        self._arrived = arrived

    def serve(self, *requests: Request) -> list[list[TokenEvent]]:
        """Each request's token events, in order."""
        found: dict[RequestId, list[TokenEvent]] = {request.id: [] for request in requests}
        for event in self.stream(*requests):
            found[event.request_id].append(event)
        return list(found.values())

    def stream(self, *requests: Request) -> Iterator[TokenEvent]:
        """The requests' token events as they come."""
        for request in requests:
            self._engine.submit(request)
        left = len(requests)
        while left:
            for event in one_by_one(self._arrived.get(timeout=60)):
                if isinstance(event, Rejected):
                    raise event.error
                assert isinstance(event, TokenEvent)
                left -= event.finish is not None
                yield event

    def cache_events(self, after: int | None) -> list[CacheEvents]:
        """What became known of the prefix cache since."""
        return self._engine.cache_events(after)

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._engine.stats()

    def load(self) -> MemberLoad:
        """The engine's latest report."""
        return self._engine.load()


@contextmanager
def live_engine(config: EngineConfig) -> Iterator[LiveEngine]:
    """An engine with its ranks in processes of this machine."""
    resolved = resolve_engine(config)
    arrived: SimpleQueue[list[EngineEvent]] = SimpleQueue()
    failures: list[Exception] = []
    outlets = EngineOutlets(
        on_events=arrived.put,
        make_ticket=ticket_maker(_MEMBER, resolved.kv_layout(), lambda _: ()),
        on_failure=failures.append,
    )
    with LocalReplica(resolved) as replica:
        engine = Engine(resolved.scheduler_config(), replica.ranks, outlets, member_id=_MEMBER)
        engine.start()
        try:
            yield LiveEngine(engine, arrived)
        finally:
            engine.halt()
    assert not failures
