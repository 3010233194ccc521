"""What a client is told of each error, over HTTP and gRPC alike: the one table of codes."""

from dataclasses import dataclass
from typing import Literal

from router.errors import (
    DeadlineExceededError,
    HandoffError,
    InvalidRequestError,
    MemberLostError,
    MoefleetError,
    NoMemberError,
    OverloadedError,
    UnknownModelError,
)

GrpcCode = Literal[
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "UNAUTHENTICATED",
    "INTERNAL",
]


class AuthenticationError(MoefleetError):
    """The request carries no key, or one that is not known here."""


class BodyTooLargeError(MoefleetError):
    """The request's body is over the limit."""


class BodyLateError(MoefleetError):
    """The request's body did not come in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """One error as clients see it."""

    status: int
    """HTTP status."""
    grpc_code: GrpcCode
    type: str
    code: str
    message: str
    param: str | None = None
    """The field that is wrong."""
    retry_after_s: float | None = None


def error_reply(error: MoefleetError) -> ErrorReply:
    """Describe an error without telling anything of the inside of the system."""
    message = str(error)
    match error:
        case InvalidRequestError(field=field):
            return _refusal(400, "INVALID_ARGUMENT", "invalid_value", message, param=field)
        case UnknownModelError():
            return _refusal(404, "NOT_FOUND", "model_not_found", message, param="model")
        case AuthenticationError():
            return _refusal(401, "UNAUTHENTICATED", "invalid_api_key", message)
        case BodyTooLargeError():
            return _refusal(413, "INVALID_ARGUMENT", "body_too_large", message)
        case BodyLateError():
            return _refusal(408, "DEADLINE_EXCEEDED", "body_late", message)
        case OverloadedError(retry_after_s=retry_after_s):
            return _failure(429, "RESOURCE_EXHAUSTED", "overloaded", message, retry_after_s)
        case MemberLostError() | HandoffError():
            return _failure(503, "UNAVAILABLE", "member_lost", message, 1.0)
        case NoMemberError():
            return _failure(503, "UNAVAILABLE", "no_member", message, 1.0)
        case DeadlineExceededError():
            return _failure(504, "DEADLINE_EXCEEDED", "deadline_exceeded", message, None)
        case _:
            return _failure(500, "INTERNAL", "internal_error", "the server failed on this request; see its log", None)


def _refusal(status: int, grpc_code: GrpcCode, code: str, message: str, param: str | None = None) -> ErrorReply:
    kind = "invalid_request_error"
    return ErrorReply(status=status, grpc_code=grpc_code, type=kind, code=code, message=message, param=param)


def _failure(status: int, grpc_code: GrpcCode, code: str, message: str, retry_after_s: float | None) -> ErrorReply:
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ErrorReply(
        status=status, grpc_code=grpc_code, type=kind, code=code, message=message, retry_after_s=retry_after_s
    )
