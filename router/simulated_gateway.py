"""A gateway of a simulated fleet: the real admission before the real router, or a simpler policy."""

from collections.abc import Callable

from router.admission import Admission, AdmissionConfig, Capacity, Entrant
from router.choosers import Chooser
from router.errors import DeadlineExceededError, OverloadedError
from router.load import CacheEvents, MemberLoad
from router.prompt import Prompt
from router.request import MemberId, RequestId
from router.simulated_member import Job, MemberSpec


class SimulatedGateway:
    """Knows of its own requests at once, and of all others by the members' reports. Times are simulated seconds.

    Args:
        chooser: who gets a request.
        admission: bounds and shares; None: every request is routed as it comes.
        spec: of each member.
        send: brings a request to a member.
    """

    def __init__(
        self,
        chooser: Chooser,
        admission: AdmissionConfig | None,
        spec: MemberSpec,
        send: Callable[[Job, MemberId, float], None],
    ) -> None:
        self._chooser = chooser
        self._admission = Admission(admission) if admission is not None else None
        self._spec = spec
        self._send = send
        self._at_gate: dict[RequestId, Job] = {}
        self._free: dict[MemberId, int] = {}
        """Tokens whose KV a member has room for, by its last report."""
        self._free_tokens = 0
        self._backlog: dict[MemberId, int] = {}
        """Prompt tokens before a member, by its last report and by what was sent since."""
        self._backlog_tokens = 0

    def enter(self, job: Job, now: float) -> None:
        """A client sends a request."""
        if self._admission is None:
            self._route(job, now)
            return
        request = job.request
        entrant = Entrant(
            id=RequestId(str(job.number)),
            tokens=request.prompt_tokens,
            max_output=request.output_tokens,
            tenant=request.tenant,
        )
        try:
            self._admission.admit(entrant, now)
        except (OverloadedError, DeadlineExceededError):
            job.refused = True
            return
        self._at_gate[entrant.id] = job
        self._decide(self._admission, now)

    def started(self, job: Job, member_id: MemberId, now: float) -> None:
        """One of its requests has its first token."""
        self._chooser.started(member_id, _key(job))
        if self._admission is not None:
            self._admission.started(RequestId(str(job.number)), now)

    def ended(self, job: Job, member_id: MemberId, now: float) -> None:
        """One of its requests has its last token."""
        self._chooser.ended(member_id)
        if self._admission is not None:
            self._admission.done(RequestId(str(job.number)), now)

    def joined(self, member_id: MemberId) -> None:
        """A member is up; its report follows."""
        self._free[member_id] = self._backlog[member_id] = 0
        self._chooser.join(member_id)

    def left(self, member_id: MemberId) -> None:
        """A member takes no more requests."""
        self._free_tokens -= self._free.pop(member_id)
        self._backlog_tokens -= self._backlog.pop(member_id)
        self._chooser.leave(member_id)

    def report(self, load: MemberLoad, events: CacheEvents | None, now: float) -> None:
        """A member tells of itself."""
        free = load.free_blocks * load.block_size
        self._free_tokens += free - self._free[load.member_id]
        self._free[load.member_id] = free
        self._count_backlog(load.member_id, load.waiting_tokens)
        self._chooser.report(load, events, now)

    def refresh(self, now: float) -> None:
        """Something changed: give turns."""
        if self._admission is not None:
            self._decide(self._admission, now)

    def _decide(self, admission: Admission, now: float) -> None:
        capacity = Capacity(
            members=len(self._free),
            step_tokens=self._spec.step_tokens,
            free_tokens=self._free_tokens,
            backlog_tokens=self._backlog_tokens,
        )
        decisions = admission.decide(capacity, now)
        for request_id in decisions.released:
            job = self._at_gate.pop(request_id)
            job.saver = request_id in decisions.savers
            self._route(job, now)
            admission.routed(request_id)
        for request_id, _ in decisions.refused:
            self._at_gate.pop(request_id).refused = True

    def _route(self, job: Job, now: float) -> None:
        blocks = job.request.full_blocks(self._spec.block_size)
        prompt = Prompt(
            _key(job),
            num_tokens=job.request.prompt_tokens,
            max_output=job.request.output_tokens,
            hashes={self._spec.block_size: blocks},
        )
        member_id = self._chooser.choose(prompt, blocks, now)
        self._send(job, member_id, now)
        self._count_backlog(member_id, self._backlog[member_id] + job.new_tokens)

    def _count_backlog(self, member_id: MemberId, tokens: int) -> None:
        self._backlog_tokens += tokens - self._backlog[member_id]
        self._backlog[member_id] = tokens


def _key(job: Job) -> str:
    return f"r{job.number}"
