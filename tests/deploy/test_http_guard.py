"""Who may call, and how much may be sent."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi.routing import APIRoute

from deploy.http_guard import PUBLIC_PATHS, ApiKey
from deploy.openai_routes import HttpConfig, create_app
from tests.support.http import PROMPT, client_of
from tests.support.serving import make_backend, make_service

pytestmark = pytest.mark.anyio


async def test_a_body_over_the_limit_is_refused_by_its_declared_length_without_reading_it() -> None:
    async with client_of(make_backend("x"), HttpConfig(max_body_bytes=100)) as client:
        reply = await client.post("/v1/completions", content=b"x" * 101)

    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_chunked_body_over_the_limit_is_refused_as_soon_as_it_is_too_long() -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 50
            yield b"x" * 50

    async with client_of(make_backend("x"), HttpConfig(max_body_bytes=100)) as client:
        reply = await client.post("/v1/completions", content=chunks())

    assert reply.status_code == 413
    assert sent <= 200


async def test_a_body_that_takes_too_long_to_come_is_refused() -> None:
    async def dribble() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x"
            await asyncio.sleep(0.05)

    backend = make_backend("x")
    async with client_of(backend, HttpConfig(body_timeout_s=0.2)) as client:
        reply = await asyncio.wait_for(client.post("/v1/completions", content=dribble()), 3.0)
        metrics = await client.get("/metrics")

    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "body_late")
    assert "within 0.2 s; send a smaller one" in reply.json()["error"]["message"]
    assert 'code="body_late"' in metrics.text


async def test_every_route_but_health_is_denied_without_a_known_key() -> None:
    config = HttpConfig(api_keys=(ApiKey(key="secret", tenant="a"), ApiKey(key="other", tenant="b")))
    app = create_app(make_service(make_backend("x")), config)
    routes = [
        (route.path, method) for route in app.routes if isinstance(route, APIRoute) for method in route.methods or ()
    ]
    assert len(routes) == len(app.routes)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path, method in [*routes, ("/v1/nothing", "GET"), ("/docs", "GET"), ("/openapi.json", "GET")]:
            for authorization in ("", "Bearer wrong", "secret", "Bearer "):
                reply = await client.request(method, path, headers={"authorization": authorization})
                assert (reply.status_code == 401) == (path not in PUBLIC_PATHS), path


async def test_a_key_names_the_tenant_of_its_requests() -> None:
    backend = make_backend("x")
    config = HttpConfig(api_keys=(ApiKey(key="hunter1", tenant="a"), ApiKey(key="hunter2", tenant="b")))
    async with client_of(backend, config) as client:
        for key in ("hunter1", "hunter2"):
            reply = await client.post("/v1/completions", json=PROMPT, headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == 200

    assert [each.tenant for each in backend.requests] == ["a", "b"]
    assert "hunter" not in repr(config)
