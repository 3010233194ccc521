"""HTTP requests that go wrong or are left: what the client is told, and that nothing goes on without it."""

import asyncio
import json
from collections.abc import Callable

import pytest

from deploy.openai_routes import HttpConfig, create_app
from router.errors import (
    CorruptDataError,
    DeadlineExceededError,
    MemberLostError,
    MoefleetError,
    NoMemberError,
    OverloadedError,
)
from router.request import Request
from tests.support.http import CHAT, PROMPT, Json, client_of
from tests.support.scripted_backend import Script, ScriptedBackend
from tests.support.serving import make_backend, make_service, make_tokenizer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (OverloadedError("too much", retry_after_s=2.5), 429, "overloaded", "3"),
        (MemberLostError("gone"), 503, "member_lost", "1"),
        (NoMemberError("none"), 503, "no_member", "1"),
        (DeadlineExceededError("late"), 504, "deadline_exceeded", None),
        (CorruptDataError("/secret/path"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_an_error_reply(
    error: MoefleetError, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    async with client_of(make_backend(Script(error=error))) as client:
        reply = await client.post("/v1/completions", json=PROMPT | {"stream": stream})

    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers.get("retry-after") == retry_after
    assert "secret" not in reply.text


async def test_a_stream_that_breaks_ends_with_an_error_and_without_done() -> None:
    script = Script(token_ids=make_tokenizer().encode("ab"), error=MemberLostError("gone"))
    async with client_of(make_backend(script)) as client:
        reply = await client.post("/v1/completions", json=PROMPT | {"stream": True})

    last = json.loads(reply.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert (last["error"]["code"], last["error"]["message"]) == ("member_lost", "gone")
    assert "[DONE]" not in reply.text


async def test_one_failed_choice_aborts_the_others() -> None:
    def script(request: Request) -> Script:
        if request.id.endswith("-1"):
            return Script(token_ids=(65,), error=MemberLostError("gone"))
        return Script(token_ids=(65,), endless=True, delay_s=0.01)

    backend = make_backend(script)
    async with client_of(backend) as client:
        reply = await client.post("/v1/completions", json=PROMPT | {"n": 3, "max_tokens": 200})

    assert reply.status_code == 503
    assert backend.running == 0


async def test_a_request_over_its_time_ends_with_504() -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.05))
    async with client_of(backend, HttpConfig(request_timeout_s=0.1)) as client:
        reply = await client.post("/v1/completions", json=PROMPT | {"max_tokens": 200})

    assert reply.status_code == 504
    assert backend.running == 0


async def cut_off(body: Json, backend: ScriptedBackend, *, seen: Callable[[], bool]) -> None:
    """Post to the application itself, and leave as soon as `seen` holds."""
    app = create_app(make_service(backend), HttpConfig())
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Json:
        if messages:
            return messages.pop()
        while not seen():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        return

    scope: Json = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await app(scope, receive, send)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_aborts_its_request_at_once(stream: bool, n: int) -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.01))
    body = PROMPT | {"stream": stream, "n": n, "max_tokens": 200}
    async with asyncio.timeout(1):
        await cut_off(body, backend, seen=lambda: backend.running == n)

    assert backend.running == 0
    assert len(backend.aborted) == n


async def test_a_client_that_leaves_in_the_queue_aborts_too() -> None:
    backend = make_backend(Script(token_ids=(65,), delay_s=3600))
    async with asyncio.timeout(1):
        await cut_off(PROMPT | {"stream": True}, backend, seen=lambda: backend.running == 1)

    assert len(backend.aborted) == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{", 400, "body"),
        ("/v1/completions", b"\xff", 400, "body"),
        ("/v1/completions", b'{"model": "tiny", "prompt": "x", "magic": 1}', 400, "magic"),
        ("/v1/completions", b'{"model": "gpt", "prompt": "x"}', 404, "model"),
        ("/v1/completions", json.dumps(PROMPT | {"prompt": "y " * 500}).encode(), 400, "prompt"),
        ("/v1/completions", json.dumps(PROMPT | {"max_tokens": 500}).encode(), 400, "max_tokens"),
        ("/v1/chat/completions", json.dumps(CHAT | {"temperature": 3}).encode(), 400, "temperature"),
    ],
)
async def test_bad_input_gets_an_error_object_that_names_the_field(
    path: str, body: bytes, status: int, param: str
) -> None:
    backend = make_backend("x")
    async with client_of(backend) as client:
        reply = await client.post(path, content=body)

    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert backend.requests == []


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
async def test_a_path_that_is_not_there_gets_an_error_object(method: str, path: str, status: int) -> None:
    async with client_of(make_backend("x")) as client:
        reply = await client.request(method, path)

    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
