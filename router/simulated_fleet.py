"""A fleet of simulated members behind its gateways, event by event; it grows and shrinks as a pool of Serve does."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Final

from router.admission import AdmissionConfig
from router.choosers import PolicyName, make_chooser
from router.errors import ConfigError
from router.load import MemberLoad
from router.request import MemberId
from router.router import RouterConfig
from router.scaling import ScalingConfig, ScalingState, desired_members
from router.simulated_gateway import SimulatedGateway
from router.simulated_member import Job, MemberSpec, Progress, SimulatedMember

_SCALE: Final = -1
"""In the place of a member's number: it is time to look at the fleet's size."""
_REPORT: Final = -1
"""In the place of a version: a report is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How the fleet follows its load; `Fleet.members` is its size at first."""

    scaling: ScalingConfig
    start_s: float = 30.0
    """From the decision until a new member is up."""
    look_s: float = 1.0
    """Between two decisions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What serves."""

    members: int
    spec: MemberSpec
    router: RouterConfig = field(default_factory=RouterConfig)
    admission: AdmissionConfig | None = None
    """Of each gateway; None: every request is routed as it comes."""
    gateways: int = 1
    """Requests come to each in turn; it knows of the others' by the members' reports alone."""
    growth: Growth | None = None
    """None: the fleet stays what it is."""
    min_report_gap_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("members", "gateways"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fleet.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(slots=True, kw_only=True)
class _Place:
    """A member with what the fleet keeps of it."""

    member: SimulatedMember
    number: int
    ready_s: float
    """When it is up."""
    load: MemberLoad | None = None
    """Its last report; None: it is not up yet."""
    reported_s: float = 0.0
    due: bool = False
    """A report is on its way, of requests that came since the last."""
    leaving: bool = False
    left_s: float = math.inf


class FleetRun:
    """One policy's run. Times are seconds on the simulation's clock."""

    def __init__(self, fleet: Fleet, policy: PolicyName, on_progress: Callable[[Progress], None]) -> None:
        self._fleet = fleet
        self._on_progress = on_progress
        self._places: dict[int, _Place] = {}
        """By number."""
        self._numbers: dict[MemberId, int] = {}
        self._ends: list[tuple[float, int, int]] = []
        """When, a member's number, and its version when this was said."""
        self._coming = 0
        """Requests that no client has sent yet."""
        choosers = [make_chooser(policy, (), fleet.router) for _ in range(fleet.gateways)]
        self._gateways = [SimulatedGateway(each, fleet.admission, fleet.spec, self._send) for each in choosers]
        self._scaled = ScalingState(members=fleet.members)
        for _ in range(fleet.members):
            self._join(self._start(0.0), 0.0)

    @property
    def members(self) -> list[SimulatedMember]:
        """All that ever were."""
        return [place.member for place in self._places.values()]

    def sizes(self, end_s: float) -> tuple[float, int]:
        """Members that were up until then on average, and the most at once."""
        were_up = [place for place in self._places.values() if place.ready_s < place.left_s]
        changes = [(min(place.ready_s, end_s), 1) for place in were_up]
        changes += [(min(place.left_s, end_s), -1) for place in were_up]
        size, most, last_s, total = 0, 0, 0.0, 0.0
        for at_s, change in sorted(changes, key=lambda each: (each[0], -each[1])):
            total += size * (at_s - last_s)
            size, last_s = size + change, at_s
            most = max(most, size if at_s < end_s else 0)
        return total / max(end_s, 1e-9), most

    def serve(self, jobs: Sequence[Job]) -> None:
        """Run until every request has ended."""
        self._coming = len(jobs)
        if self._fleet.growth is not None and jobs:
            heappush(self._ends, (jobs[0].arrival_s, _SCALE, 0))
        for job in jobs:
            self._run_until(job.arrival_s)
            self._coming -= 1
            self._gateways[job.number % len(self._gateways)].enter(job, job.arrival_s)
        self._run_until(math.inf)

    def _send(self, job: Job, member_id: MemberId, now: float) -> None:
        place = self._places[self._numbers[member_id]]
        self._push(place, place.member.add(job, now))
        if not place.due:
            place.due = True
            heappush(self._ends, (max(place.reported_s + self._fleet.min_report_gap_s, now), place.number, _REPORT))

    def _push(self, place: _Place, end_s: float | None) -> None:
        if end_s is not None:
            heappush(self._ends, (end_s, place.number, place.member.version))

    def _run_until(self, limit_s: float) -> None:
        while self._ends and self._ends[0][0] <= limit_s:
            now, number, version = heappop(self._ends)
            if number == _SCALE:
                self._scale(now)
                continue
            place = self._places[number]
            if place.load is None:
                self._join(place, now)
            elif version == _REPORT:
                self._report_due(place, now)
            elif version == place.member.version:
                self._advance(place, now)

    def _advance(self, place: _Place, now: float) -> None:
        progress, next_end = place.member.advance(now)
        self._push(place, next_end)
        self._on_progress(progress)
        member_id = place.member.member_id
        for job in progress.started:
            self._gateways[job.number % len(self._gateways)].started(job, member_id, now)
        for job in progress.ended:
            self._gateways[job.number % len(self._gateways)].ended(job, member_id, now)
        if next_end is None and place.leaving:
            place.left_s = now
        if not place.leaving and (next_end is None or now - place.reported_s >= self._fleet.min_report_gap_s):
            self._report(place, now)
        for gateway in self._gateways:
            gateway.refresh(now)

    def _report_due(self, place: _Place, now: float) -> None:
        """Tell of requests that came, where no report has told of them since."""
        if place.due and not place.leaving:
            self._report(place, now)
            for gateway in self._gateways:
                gateway.refresh(now)

    def _report(self, place: _Place, now: float) -> None:
        place.reported_s = now
        load, events = place.member.load(), place.member.take_events()
        place.load, place.due = load, False
        for gateway in self._gateways:
            gateway.report(load, events, now)

    def _start(self, ready_s: float) -> _Place:
        number = len(self._places)
        member = SimulatedMember(MemberId(f"m{number}"), self._fleet.spec)
        place = self._places[number] = _Place(member=member, number=number, ready_s=ready_s)
        self._numbers[member.member_id] = number
        return place

    def _join(self, place: _Place, now: float) -> None:
        """A member is up, if nobody has thought better of it."""
        if place.leaving:
            return
        for gateway in self._gateways:
            gateway.joined(place.member.member_id)
        self._report(place, now)
        for gateway in self._gateways:
            gateway.refresh(now)

    def _scale(self, now: float) -> None:
        """Let the fleet follow its load, by what its members have last reported."""
        growth = self._fleet.growth
        busy = any(place.member.is_busy for place in self._places.values())
        if growth is None or not (self._coming or busy):
            return
        staying = [place for place in self._places.values() if not place.leaving]
        loads = [place.load for place in staying if place.load is not None]
        state = replace(self._scaled, members=len(staying))
        wanted, self._scaled = desired_members(loads, growth.scaling, now, state)
        for _ in range(wanted - len(staying)):
            place = self._start(now + growth.start_s)
            heappush(self._ends, (place.ready_s, place.number, 0))
        # The youngest first: what is cached is with the others.
        for place in staying[wanted:]:
            self._leave(place, now)
        heappush(self._ends, (now + growth.look_s, _SCALE, 0))

    def _leave(self, place: _Place, now: float) -> None:
        """A member takes no more requests, and is gone when it has served those that it has."""
        place.leaving = True
        if place.load is None:
            place.ready_s = place.left_s = now
            return
        if not place.member.is_busy:
            place.left_s = now
        for gateway in self._gateways:
            gateway.left(place.member.member_id)
