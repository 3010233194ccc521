"""The gateway's HTTP server on a real port: what runs when it leaves, and who comes after it."""

import asyncio

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from deploy.http_server import HttpServer, listen

pytestmark = pytest.mark.anyio


class Slow:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.came.set()
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def test_a_server_that_leaves_ends_what_runs_and_gives_its_port_up_at_once() -> None:
    app = Slow()
    server = HttpServer(app, listen("127.0.0.1", 0), drain_s=10.0)
    assert server.has_ended
    await server.start()
    port = server.port
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        running = asyncio.create_task(client.get("/"))
        await app.came.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0.3)
        assert not stopping.done()
        with listen("127.0.0.1", port):
            app.go.set()
            assert (await running).text == "ok"
        await stopping
    assert server.has_ended


async def test_what_does_not_end_in_time_is_cut() -> None:
    app = Slow()
    server = HttpServer(app, listen("127.0.0.1", 0), drain_s=0.5)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        running = asyncio.create_task(client.get("/"))
        await app.came.wait()
        await asyncio.wait_for(server.stop(), 5.0)
        with pytest.raises(httpx.HTTPError):
            (await running).raise_for_status()
