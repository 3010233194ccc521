"""Where requests wait at the gateway for their turn: the admission's decisions as futures. Lives on the event loop."""

import asyncio
from collections.abc import Callable, Iterable

from router.admission import Admission, Capacity, entrant_of
from router.load import MemberLoad
from router.request import Request, RequestId


class Gate:
    """Asks `admission` for decisions whenever something changed.

    Args:
        admission: who may enter, and when.
        loads: the members' latest reports.
        backlog: prompt tokens that members have before them, with what was routed since they reported.
        clock: unix seconds.
    """

    def __init__(
        self,
        admission: Admission,
        loads: Callable[[], Iterable[MemberLoad]],
        backlog: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._admission = admission
        self._loads = loads
        self._backlog = backlog
        self._clock = clock
        self._turns: dict[RequestId, asyncio.Future[bool]] = {}

    def check_room(self, tenant: str, priority: int) -> None:
        """As `Admission.check_room`."""
        self._admission.check_room(tenant, priority)

    def enter(self, request: Request) -> "asyncio.Future[bool]":
        """Let a request wait; `leave` must follow. The result comes with its turn, or its refusal as an error.

        It says whether the request is one of `Decisions.savers`.

        Raises:
            DeadlineExceededError, InvalidRequestError, OverloadedError: as `Admission.admit`.
        """
        self._admission.admit(entrant_of(request), self._clock())
        turn = self._turns[request.id] = asyncio.get_running_loop().create_future()
        self._decide()
        return turn

    def routed(self, request_id: RequestId) -> None:
        """It is on its way to a member."""
        self._admission.routed(request_id)

    def started(self, request_id: RequestId) -> None:
        """It has its first token: others may have their turn."""
        self._admission.started(request_id, self._clock())
        self._decide()

    def leave(self, request_id: RequestId) -> None:
        """It ended, however it did."""
        self._turns.pop(request_id, None)
        self._admission.done(request_id, self._clock())
        self._decide()

    def refresh(self) -> None:
        """Members came, left or told of themselves."""
        if self._turns:
            self._decide()

    def waiting(self) -> dict[int, int]:
        """As `Admission.waiting`."""
        return self._admission.waiting()

    def _decide(self) -> None:
        decisions = self._admission.decide(_capacity(self._loads(), self._backlog()), self._clock())
        for request_id in decisions.released:
            turn = self._turns.pop(request_id)
            # Whoever was cancelled is about to leave.
            if not turn.done():
                turn.set_result(request_id in decisions.savers)
        for request_id, error in decisions.refused:
            turn = self._turns.pop(request_id)
            if not turn.done():
                turn.set_exception(error)


def _capacity(loads: Iterable[MemberLoad], backlog_tokens: int) -> Capacity:
    """Of the members that compute prompts, the prefill pool, or all where there is none; and of those that decode."""
    able = [load for load in loads if not load.draining]
    prefill = [load for load in able if load.role == "prefill"]
    decode = [load for load in able if load.role != "prefill"]
    computing = prefill or able
    return Capacity(
        members=len(computing),
        step_tokens=max((load.step_tokens for load in computing), default=0),
        decode_places=_decode_places(prefill, decode) if prefill and decode else None,
        free_tokens=sum(load.free_blocks * load.block_size for load in decode or able),
        backlog_tokens=backlog_tokens,
    )


def _decode_places(prefill: list[MemberLoad], decode: list[MemberLoad]) -> int:
    """Rows that are free, less the sequences that are prefilled and on their way.

    A member where a request waits has no room for another, whatever it lacks: rows, blocks or state slots.
    """
    free = sum(max(load.max_requests - load.running_requests, 0) for load in decode if not load.waiting_requests)
    return max(free - sum(load.handoff_requests for load in prefill), 0)
