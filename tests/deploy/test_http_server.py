"""The gateway's HTTP server on a real port: what runs when it leaves, and who comes after it."""

import asyncio
import contextlib
import resource

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from deploy.http_server import HttpServer, listen, most_connections

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


async def send_without_end(writer: asyncio.StreamWriter) -> None:
    for _ in range(64):
        writer.write(b"a" * (1 << 18))
        await writer.drain()
        await asyncio.sleep(0.01)


async def test_a_head_without_end_is_cut() -> None:
    server = HttpServer(PlainTextResponse("ok"), listen("127.0.0.1", 0), drain_s=0.5)
    await server.start()
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nx: ")
    with pytest.raises(ConnectionError):
        await send_without_end(writer)
    writer.close()
    await server.stop()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nx: y", b"GET / HTTP/1.1\r\n\r\nGET"])
async def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.http_server._KEEP_ALIVE_S", 0.3)
    server = HttpServer(PlainTextResponse("ok"), listen("127.0.0.1", 0), drain_s=0.5)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent)
    told = await asyncio.wait_for(reader.read(), 5.0)
    assert told.endswith(b"ok") == sent.endswith(b"GET")
    writer.close()
    await server.stop()


async def test_the_rest_of_a_body_that_was_refused_is_not_waited_for() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.http_server._KEEP_ALIVE_S", 0.3)
        server = HttpServer(PlainTextResponse("ok"), listen("127.0.0.1", 0), drain_s=0.5)
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n")
        reading = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"a")
                await writer.drain()
                if reading.done():
                    break
                await asyncio.sleep(0.05)
        assert reading.done()
        writer.close()
        await server.stop()


async def test_an_answer_takes_longer_than_the_next_head_may() -> None:
    app = Slow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.http_server._KEEP_ALIVE_S", 0.1)
        server = HttpServer(app, listen("127.0.0.1", 0), drain_s=0.5)
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\nGET")
        await asyncio.sleep(0.4)
        app.go.set()
        assert (await asyncio.wait_for(reader.read(), 5.0)).endswith(b"ok")
        writer.close()
        await server.stop()


async def test_connections_without_requests_keep_nobody_out() -> None:
    server = HttpServer(PlainTextResponse("ok"), listen("127.0.0.1", 0), drain_s=0.5, max_connections=8)
    await server.start()
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        assert (await client.get("/v1/models")).text == "ok"
    closed = [await asyncio.wait_for(reader.read(), 5.0) for reader, _ in silent[:32]]
    assert closed == [b""] * 32
    for _, writer in silent:
        writer.close()
    await server.stop()


async def test_more_requests_than_connections_are_refused_but_for_health() -> None:
    app = Slow()

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        await (PlainTextResponse("well") if scope["path"] == "/health" else app)(scope, receive, send)

    server = HttpServer(routed, listen("127.0.0.1", 0), drain_s=0.5, max_connections=4)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        running = [asyncio.create_task(client.get("/")) for _ in range(3)]
        await asyncio.sleep(0.3)
        refused = await client.get("/")
        health = await client.get("/health?x")
        again = await client.get("/")
        app.go.set()
        assert [(await each).text for each in running] == ["ok"] * 3
        assert (await client.get("/")).text == "ok"
    assert (refused.status_code, health.text, again.status_code) == (503, "well", 503)
    await server.stop()


@pytest.mark.parametrize(("files", "most"), [(1024, 512), (1 << 20, 8192), (resource.RLIM_INFINITY, 8192)])
def test_connections_leave_files_for_the_rest(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(_: int) -> tuple[int, int]:
        return files, files

    monkeypatch.setattr(resource, "getrlimit", limit)
    assert most_connections() == most
