"""Whether this gateway can serve, for load balancers and probes."""

from dataclasses import dataclass

from router.errors import MoefleetError
from router.load import MemberLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    """What /health and grpc.health.v1 tell."""

    ready: bool
    reason: str = ""
    """Why not, when it is not ready."""
    members: int = 0


def health_report(loads: tuple[MemberLoad, ...], error: MoefleetError | None) -> HealthReport:
    """Sum up the back end: `error` is what its own check raised, if it did."""
    return HealthReport(ready=error is None, reason="" if error is None else str(error), members=len(loads))
