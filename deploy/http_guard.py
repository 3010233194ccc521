"""What every HTTP request passes before a route sees it: the size limit, the key, and whether there is room for it."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.error_replies import AuthenticationError, BodyLateError, BodyTooLargeError, error_reply
from deploy.sse import error_response
from router.errors import OverloadedError

PUBLIC_PATHS = frozenset({"/health", "/-/healthz"})
"""All other paths need a key where keys are configured, those that do not exist too."""
_PRIORITY: Final = b'"priority"'


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


class RoomCheck:
    """Refuses what needs no parsing to be refused: in an overload that is most of what comes, and a route costs more.

    Args:
        app: what comes behind.
        paths: of POST requests that ask for room.
        check_room: raises OverloadedError for a tenant and priority that are refused whatever else they ask for.
        on_refused: told the code of each refusal.
        body_timeout_s: a body that takes longer to come is refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        paths: Collection[str],
        check_room: Callable[[str, int], None],
        on_refused: Callable[[str], None],
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._paths = paths
        self._check_room = check_room
        self._on_refused = on_refused
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body read, or refuse it."""
        if scope["type"] != "http" or scope["path"] not in self._paths or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            messages = await self._worth_parsing(scope["state"]["tenant"], receive)
        except (BodyLateError, OverloadedError) as error:
            reply = error_reply(error)
            self._on_refused(reply.code)
            await error_response(reply)(scope, receive, send)
            return
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)

    async def _worth_parsing(self, tenant: str, receive: Receive) -> list[Message]:
        """The request's messages as far as its body goes, unless it is refused at present."""
        refusal = self._refusal(tenant, 0)
        if refusal is not None and all(self._refusal(tenant, priority) for priority in (1, -1)):
            # Whatever priority it names: none of its body is held.
            raise refusal
        try:
            async with asyncio.timeout(self._body_timeout_s):
                messages = [await receive()]
                while messages[-1].get("more_body"):
                    messages.append(await receive())
        except TimeoutError as error:
            late = f"body: did not come within {self._body_timeout_s:g} s; send a smaller one, or send it faster"
            raise BodyLateError(late) from error
        # One that names a priority is told apart when it is parsed.
        if _PRIORITY not in b"".join(message.get("body", b"") for message in messages):
            self._check_room(tenant, 0)
        return messages

    def _refusal(self, tenant: str, priority: int) -> OverloadedError | None:
        try:
            self._check_room(tenant, priority)
        except OverloadedError as error:
            return error
        return None


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
