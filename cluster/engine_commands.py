"""What others ask of an engine's thread."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.plan import KvTicket
from cluster.sequence import Mode
from router.request import Request, RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Take a request in; with a ticket it goes on with what was prefilled elsewhere."""

    request: Request
    mode: Mode
    ticket: KvTicket | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request."""

    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Free the KV of a ticket."""

    ticket_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """Fetch what is prefilled elsewhere so far."""

    request_id: RequestId
    hashes: Sequence[int]
    ticket: KvTicket


Command = Submit | Abort | Release | Expect
