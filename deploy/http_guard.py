"""What every HTTP request passes before a route sees it: the size limit, then the key."""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.error_replies import AuthenticationError, BodyTooLargeError, error_reply
from deploy.sse import error_response

PUBLIC_PATHS = frozenset({"/health", "/-/healthz"})
"""All other paths need a key where keys are configured, those that do not exist too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A key that clients may use, and whose requests they then are."""

    key: str = field(repr=False)
    tenant: str = ""


class KeyRing:
    """Checks keys in a time that does not depend on how much of a wrong key is right."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._tenants = [(_digest(each.key), each.tenant) for each in keys]

    def tenant(self, authorization: str) -> str:
        """The tenant of an `authorization` header; any header will do where no keys are configured.

        Raises:
            AuthenticationError: there is no key in it, or one that is not known.
        """
        if not self._tenants:
            return ""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("authorization: send the header 'Authorization: Bearer KEY'")
        given = _digest(key.strip())
        found = [tenant for digest, tenant in self._tenants if hmac.compare_digest(digest, given)]
        if not found:
            raise AuthenticationError("authorization: the key is not known here")
        return found[0]


class SizeLimit:
    """Refuses a body over the limit, by its declared length or as soon as too much of it has come."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max:
                raise self._error()
            return message

        try:
            declared = _header(scope, b"content-length")
            if declared.isdigit() and int(declared) > self._max:
                raise self._error()
            await self._app(scope, counted, send)
        except BodyTooLargeError as error:
            await error_response(error_reply(error))(scope, receive, send)

    def _error(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"body: is larger than {self._max} bytes; send a smaller one")


class KeyCheck:
    """Lets a request in by its key, and notes its tenant in `scope["state"]`."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            tenant = self._keys.tenant(_header(scope, b"authorization"))
        except AuthenticationError as error:
            await error_response(error_reply(error))(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
