"""Who may enter, and when: bounds on what is in flight and waits, and fair turns while the fleet is busy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from router.errors import ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from router.fair_queue import FairQueue, Flow, Waiting
from router.pace import Pace
from router.request import FIRST_PRIORITY, Request, RequestId

_LEAST_WEIGHT: Final = 0.001
_MOST_WEIGHT: Final = 1e6
_PART: Final = 1.5
"""Times its share of the members' room that a flow may take beside others which fill it."""
_LEAST_PLACES: Final = 2
"""That a flow may take so at least beside others, or at one of several gateways: of few members its share is no whole
place, and a gateway sees a part of its requests, in no even order."""
_MOST_STARTING: Final = 3
"""Times the members' room that is given in this way, at most."""
_MOST_OF_FEW: Final = 8
"""Requests that all gateways together give so at least: a few tenants' bursts at a small fleet."""
_BURST_STEPS: Final = 4
"""Full steps of all members that a quiet tenant's burst may be worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Bounds of one gateway, and what tenants and classes get of a busy fleet."""

    max_in_flight: int = 1024
    """Requests admitted and not done."""
    max_queue: int = 256
    """Of these, those without a first token."""
    gateways: int = 1
    """That share the members: each gives turns for its part of their room."""
    min_retry_s: float = 0.5
    max_retry_s: float = 30.0
    """Bounds of what a refused client is told to wait."""
    expected_output: int = 256
    """Tokens that a request is taken to produce, if it may; limits that clients set are far above what they use."""
    starting_per_member: float = 1.0
    """Requests without a first token that members get at once: few, so that a turn comes soon; enough for all."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of tenants; 1 for those not named."""
    class_weight: float = 4.0
    """What requests of positive priority get for each token of those of none, and these for those of negative."""

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "max_queue", "gateways", "expected_output"):
            if getattr(self, name) < 1:
                raise ConfigError(f"admission.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_retry_s <= self.max_retry_s:
            raise ConfigError(
                f"admission.min_retry_s must be positive and at most max_retry_s, got {self.min_retry_s} and "
                f"{self.max_retry_s}"
            )
        weights = {"starting_per_member": self.starting_per_member, "class_weight": self.class_weight}
        weights |= {f"tenant_weights.{tenant}": weight for tenant, weight in self.tenant_weights.items()}
        for name, weight in weights.items():
            if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
                raise ConfigError(f"admission.{name} must be from {_LEAST_WEIGHT} to {_MOST_WEIGHT}, got {weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """What admission needs of a request."""

    id: RequestId
    tokens: int
    """Of its prompt, and those emitted so far."""
    max_output: int
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None


def member_priority(priority: int, *, saver: bool) -> int:
    """A request's place at its member: what a client says of its own requests moves it among those alike alone.

    Args:
        priority: its client's.
        saver: of `Decisions.savers`; what its client can wait for is not put before others for it.
    """
    own = _class_of(priority)
    return own + (FIRST_PRIORITY if saver and own >= 0 else 0)


def entrant_of(request: Request) -> Entrant:
    """A request at the gate."""
    return Entrant(
        id=request.id,
        tokens=len(request.prompt_ids) + len(request.output_ids),
        max_output=request.sampling.max_tokens,
        tenant=request.tenant,
        priority=request.priority,
        deadline_s=request.deadline_unix_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The members that compute prompts, and those that go on."""

    members: int
    step_tokens: int
    """Tokens that one computes in a step."""
    decode_places: int | None = None
    """Sequences that other members have room to decode, beside those on their way; None: who computes decodes."""
    free_tokens: int | None = None
    """KV that the members that decode have room for; a request takes its prompt, cached or not, and its output. None:
    without bounds."""
    backlog_tokens: int | None = None
    """Prompt tokens that those who compute prompts have before them, of requests that were routed; None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What became of requests that waited."""

    released: tuple[RequestId, ...]
    """To be routed now, in this order."""
    savers: frozenset[RequestId]
    """Of these, those paid for by what their flows left unused: they go first at the members too."""
    refused: tuple[tuple[RequestId, OverloadedError | DeadlineExceededError], ...]


# Not frozen: admission counts in it.
@dataclass(slots=True, kw_only=True)
class _Share:
    """A flow with requests that have no first token."""

    weight: float
    requests: int = 0
    starting: int = 0
    """Of these, those that have had their turn."""


class Admission:
    """Requests in flight at one gateway. Used by one thread; times are unix seconds."""

    def __init__(self, config: AdmissionConfig | None = None) -> None:
        self._config = config or AdmissionConfig()
        self._in_flight: set[RequestId] = set()
        self._waiting: dict[RequestId, Waiting] = {}
        self._starting: dict[RequestId, Waiting] = {}
        self._shares: dict[Flow, _Share] = {}
        self._weights = 0.0
        """Of all of these together."""
        self._queue = FairQueue()
        self._refused: list[tuple[RequestId, OverloadedError | DeadlineExceededError]] = []
        self._starting_tokens = 0
        self._routing: dict[RequestId, int] = {}
        """Tokens of those that have their turn and are in no member's backlog yet."""
        self._routing_tokens = 0
        self._pace = Pace()

    @property
    def num_in_flight(self) -> int:
        """Requests admitted and not done."""
        return len(self._in_flight)

    @property
    def num_queued(self) -> int:
        """Requests admitted that have no first token."""
        return len(self._waiting) + len(self._starting)

    def waiting(self) -> dict[int, int]:
        """Requests that wait for their turn, by class: 1, 0 and -1 for positive, no and negative priority."""
        counts = dict.fromkeys((1, 0, -1), 0)
        for (_, priority_class), count in self._queue.counts().items():
            counts[priority_class] += count
        return counts

    def admit(self, request: Entrant, now: float) -> None:
        """Let a request wait for its turn, which `decide` gives; `done` must follow.

        Where all places are taken, the newest request of whoever has most waiting for its share makes room, be it this
        one or another.

        Raises:
            DeadlineExceededError: nobody waits for it any more, or it would not get its turn in time.
            InvalidRequestError: its id is in flight.
            OverloadedError: a bound is reached; says when to come back.
        """
        if request.id in self._in_flight:
            raise InvalidRequestError(f"request id {request.id} is in flight already; use a new one", field="id")
        item, weight = self._item(request), self._weight(request)
        wait_s = self._wait_s(item, weight)
        self._check_deadline(item, wait_s, now)
        bound = self._bound_reached()
        if bound:
            last = self._queue.last_of_longest()
            burden = self._queue.burden(item.flow) + item.tokens / weight
            if last is None or last.flow == item.flow or self._queue.burden(last.flow) <= burden:
                raise self._overloaded(bound, wait_s)
            self._refuse(last, self._overloaded(bound, wait_s))
        self._in_flight.add(request.id)
        self._waiting[request.id] = item
        self._queue.push(item, weight)
        self._count(item, weight)
        self._pace.watch(now, waiting=True)

    def check_room(self, tenant: str, priority: int) -> None:
        """Before anything is made of a request: whether `admit` would refuse it, whatever else it asks for.

        Raises:
            OverloadedError: as `admit`.
        """
        bound = self._bound_reached()
        if not bound:
            return
        entrant = Entrant(id=RequestId(""), tokens=1, max_output=1, tenant=tenant, priority=priority)
        item, weight = self._item(entrant), self._weight(entrant)
        last = self._queue.last_of_longest()
        if last is None or last.flow == item.flow:
            raise self._overloaded(bound, self._wait_s(item, weight))

    def decide(self, capacity: Capacity, now: float) -> Decisions:
        """Give turns while the members have room for more first tokens; without members all go, to be told so."""
        released: list[RequestId] = []
        savers: list[RequestId] = []
        self._queue.set_burst(_BURST_STEPS * capacity.members * capacity.step_tokens)
        limit = capacity.members * self._config.starting_per_member / self._config.gateways
        while not capacity.members or self._may_start(limit, capacity):
            saver = self._queue.next_saver
            item = self._queue.pop()
            if item is None:
                break
            del self._waiting[item.request_id]
            if item.deadline_s is not None and item.deadline_s <= now:
                error = DeadlineExceededError(f"{item.request_id}: its deadline passed in the queue; allow more time")
                self._refused.append((item.request_id, error))
                self._uncount(item)
                continue
            self._start(item)
            self._routing[item.request_id] = item.tokens
            self._routing_tokens += item.tokens
            released.append(item.request_id)
            savers += [item.request_id] if saver == item.flow else []
        refused = tuple(self._refused)
        self._refused.clear()
        self._pace.watch(now, waiting=len(self._queue) > 0)
        return Decisions(released=tuple(released), savers=frozenset(savers), refused=refused)

    def _start(self, item: Waiting) -> None:
        self._starting[item.request_id] = item
        self._starting_tokens += item.tokens
        self._shares[item.flow].starting += 1

    def _count(self, item: Waiting, weight: float) -> None:
        share = self._shares.get(item.flow)
        if share is None:
            share = self._shares[item.flow] = _Share(weight=weight)
            self._weights += weight
        share.requests += 1

    def _uncount(self, item: Waiting) -> None:
        share = self._shares[item.flow]
        share.requests -= 1
        if not share.requests:
            del self._shares[item.flow]
            self._weights = self._weights - share.weight if self._shares else 0.0

    def _may_start(self, limit: float, capacity: Capacity) -> bool:
        """Whether the members have room for the next request, or its flow left them free and has not its part of them.

        Or those who ask for little would have their turns one by one where somebody always takes all room, and side
        by side where nobody does.
        """
        if not self._can_go_on(capacity):
            return False
        tokens = limit * capacity.step_tokens
        if len(self._starting) < limit or self._starting_tokens < tokens:
            return True
        # Members that are about to run out of prompts: a turn given at a first token comes some steps late.
        if capacity.backlog_tokens is not None and capacity.backlog_tokens + self._routing_tokens < tokens:
            return True
        flow = self._queue.next_saver
        gateways = self._config.gateways
        if flow is None or len(self._starting) >= max(_MOST_STARTING * limit, _MOST_OF_FEW / gateways):
            return False
        share = self._shares[flow]
        # Who alone fills the members has no need of more.
        least = _LEAST_PLACES if gateways > 1 or len(self._starting) > share.starting else 1
        return share.starting < max(limit * min(_PART * share.weight / self._weights, 1.0), least)

    def _can_go_on(self, capacity: Capacity) -> bool:
        """Whether what is prefilled can be decoded, and has room."""
        # What is prefilled while nobody can decode it holds KV at the prefill members for nothing.
        if capacity.decode_places is not None and len(self._starting) >= capacity.decode_places:
            return False
        # One may always wait at a member: it gets the room that comes free.
        full = capacity.free_tokens is not None and self._starting_tokens >= capacity.free_tokens
        return not (self._starting and full)

    def routed(self, request_id: RequestId) -> None:
        """The request is on its way to a member, and in its backlog from now on. More calls change nothing."""
        self._routing_tokens -= self._routing.pop(request_id, 0)

    def started(self, request_id: RequestId, now: float) -> None:
        """The request has its first token. More calls change nothing."""
        self.routed(request_id)
        item = self._starting.pop(request_id, None)
        if item is not None:
            self._starting_tokens -= item.tokens
            self._shares[item.flow].starting -= 1
            self._uncount(item)
            self._pace.take(item.tokens, now)

    def done(self, request_id: RequestId, now: float) -> None:
        """The request ended, however it did; ids that are not in flight change nothing."""
        self.started(request_id, now)
        item = self._waiting.pop(request_id, None)
        if item is not None:
            self._queue.remove(item)
            self._uncount(item)
            self._pace.watch(now, waiting=len(self._queue) > 0)
        self._in_flight.discard(request_id)

    def _item(self, request: Entrant) -> Waiting:
        return Waiting(
            request_id=request.id,
            flow=(request.tenant, _class_of(request.priority)),
            tokens=request.tokens + min(request.max_output, self._config.expected_output),
            deadline_s=request.deadline_s,
        )

    def _weight(self, request: Entrant) -> float:
        tenant = self._config.tenant_weights.get(request.tenant, 1.0)
        return tenant * self._config.class_weight ** _class_of(request.priority)

    def _wait_s(self, item: Waiting, weight: float) -> float:
        """Seconds until a new request has its turn, at the pace that the fleet had when it was last busy."""
        pace = self._pace.per_s
        before = self._queue.tokens_before(item.flow, item.tokens, weight) - item.tokens
        if before <= 0:
            return 0.0
        return before / pace if pace else self._config.min_retry_s

    def _check_deadline(self, item: Waiting, wait_s: float, now: float) -> None:
        if item.deadline_s is None:
            return
        if item.deadline_s <= now:
            ago = f"{now - item.deadline_s:.3f} s ago"
            raise DeadlineExceededError(f"{item.request_id}: deadline passed {ago}; send it with a later one")
        if item.deadline_s <= now + wait_s:
            raise DeadlineExceededError(
                f"{item.request_id}: its turn comes in {wait_s:.1f} s, its deadline in {item.deadline_s - now:.1f} s; "
                "send it with a later one"
            )

    def _bound_reached(self) -> str:
        if len(self._in_flight) >= self._config.max_in_flight:
            return f"max_in_flight={self._config.max_in_flight}"
        if self.num_queued >= self._config.max_queue:
            return f"max_queue={self._config.max_queue}"
        return ""

    def _refuse(self, item: Waiting, error: OverloadedError) -> None:
        self._queue.remove(item)
        self._uncount(item)
        del self._waiting[item.request_id]
        self._in_flight.discard(item.request_id)
        self._refused.append((item.request_id, error))

    def _overloaded(self, bound: str, wait_s: float) -> OverloadedError:
        retry_s = min(max(wait_s, self._config.min_retry_s), self._config.max_retry_s)
        return OverloadedError(
            f"admission.{bound} requests reached; try again in {retry_s:.1f} s", retry_after_s=retry_s
        )


def _class_of(priority: int) -> int:
    """1, 0 or -1: requests of positive, no and negative priority."""
    return (priority > 0) - (priority < 0)
