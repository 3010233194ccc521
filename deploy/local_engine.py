"""Serves requests with an engine of this process on ranks that are loaded, for commands that need no fleet."""

import logging
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Final

from cluster.engine import Engine, EngineEvent, EngineOutlets, Rejected, TicketReady
from cluster.engine_stats import EngineStats
from cluster.executor import Ranks
from cluster.resolve import ResolvedEngine
from cluster.speculation import DraftPolicy
from cluster.ticket import ticket_maker
from router.errors import MoefleetError
from router.request import MemberId, Request, RequestId, TokenColumns, TokenEvent

logger = logging.getLogger(__name__)

_MEMBER: Final = MemberId("local")


def stream_all(
    engine: ResolvedEngine,
    ranks: Ranks,
    requests: Sequence[Request],
    *,
    draft_policy: DraftPolicy | None = None,
    on_begin: Callable[[Callable[[], EngineStats]], None] | None = None,
) -> Iterator[list[TokenEvent]]:
    """Serve requests together, all there at the first step -> each step's events; the ranks stay up.

    Args:
        draft_policy: what was learnt of drafts on these ranks before; None: nothing.
        on_begin: gets what reads the engine's counters, at any time from then on.

    Raises:
        MoefleetError: a request was rejected, or the ranks failed.
    """
    arrived: SimpleQueue[list[EngineEvent]] = SimpleQueue()
    outlets = EngineOutlets(
        on_events=arrived.put,
        make_ticket=ticket_maker(_MEMBER, engine.kv_layout(), lambda _: ()),
        on_failure=lambda error: logger.error("%s", error),
    )
    timeout_s = engine.config.step_timeout_s
    runner = Engine(
        engine.scheduler_config(),
        ranks,
        outlets,
        member_id=_MEMBER,
        step_timeout_s=timeout_s,
        draft_policy=draft_policy,
    )
    if on_begin is not None:
        on_begin(runner.stats)
    for request in requests:
        runner.submit(request)
    runner.start()
    open_requests = {request.id for request in requests}
    try:
        while open_requests:
            yield [event for events in arrived.get() for event in _token_events(events, open_requests)]
    finally:
        runner.halt()


def _token_events(event: EngineEvent, open_requests: set[RequestId]) -> list[TokenEvent]:
    match event:
        case TokenColumns():
            return event.events()
        case TokenEvent():
            if event.finish == "error":
                raise MoefleetError(event.error)
            if event.finish is not None:
                open_requests.discard(event.request_id)
            return [event]
        case Rejected():
            raise event.error
        case TicketReady():
            raise AssertionError("no request asked for a hand-off")
