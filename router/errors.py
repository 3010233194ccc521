"""The exception tree of MoEFleet: what a caller can get wrong, and what the system can refuse or lose."""


class MoefleetError(Exception):
    """Base of every error that MoEFleet raises for its callers."""


class InvalidRequestError(MoefleetError, ValueError):
    """The request can never be served as it is: names the field, the value and what would do."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(MoefleetError, ValueError):
    """A configuration, flag or layout that cannot work: names the option, the value and what would do."""


class CheckpointError(MoefleetError, ValueError):
    """A checkpoint that cannot be served: names file, tensor, expected and found."""


class UnknownModelError(MoefleetError):
    """The named model is not served here."""


class OverloadedError(MoefleetError):
    """Refused for now; the same request may be sent again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MemberLostError(MoefleetError):
    """The member that served the request died or left; the same request may be sent again."""


class NoMemberError(MoefleetError):
    """No member of the needed role is up; the same request may be sent again."""


class DeadlineExceededError(MoefleetError):
    """The request's deadline passed before its last token."""


class HandoffError(MoefleetError):
    """KV or state could not be moved: expired, lost source, layout or checksum mismatch."""


class CorruptDataError(MoefleetError):
    """A frame or block arrived damaged or from a peer that is not ours."""
