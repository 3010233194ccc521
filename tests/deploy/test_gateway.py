"""What a gateway reads and decides before and beside its serving."""

import asyncio
import socket

import grpc
import httpx
import pytest
from starlette.responses import PlainTextResponse

from cluster.directory import Membership
from cluster.dispatcher import Dispatcher
from cluster.members import MemberInfo
from deploy.gateway import RunningGateway, bind_when_free, listen_when_free, members_to_serve
from deploy.grpc_service import GrpcConfig
from deploy.http_server import HttpServer, listen
from deploy.openai_routes import HttpConfig, create_app
from router.admission import Admission
from router.errors import ConfigError, MemberLostError
from router.request import MemberId
from router.router import Router
from tests.support.serving import make_backend, make_service


def make_member(name: str, *, generation: int = 0) -> MemberInfo:
    return MemberInfo(member_id=MemberId(name), role="decode", address="127.0.0.1:1", generation=generation)


def make_membership(*members: MemberInfo, settled: bool) -> Membership:
    return Membership(version=1, members=members, max_model_len={}, settled=settled)


def test_members_that_a_restarted_directory_has_not_heard_of_yet_are_kept() -> None:
    known = (make_member("a"), make_member("b"))
    told = make_membership(make_member("a", generation=1), settled=False)
    assert members_to_serve(known, told) == (make_member("a", generation=1), make_member("b"))


def test_members_that_a_settled_directory_does_not_list_are_left() -> None:
    told = make_membership(make_member("a"), settled=True)
    assert members_to_serve((make_member("a"), make_member("b")), told) == told.members


@pytest.mark.anyio
async def test_a_gateway_waits_for_the_port_of_the_one_it_replaces() -> None:
    leaving = socket.create_server(("127.0.0.1", 0))
    port = leaving.getsockname()[1]
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    binding = asyncio.create_task(bind_when_free(server, GrpcConfig(port=port), patience_s=10.0))
    await asyncio.sleep(0.1)
    assert not binding.done()
    leaving.close()
    assert await binding == port
    await server.stop(None)


@pytest.mark.anyio
async def test_a_port_that_stays_in_use_is_refused_by_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound"):
            await bind_when_free(server, GrpcConfig(port=port), patience_s=0.0)
        await server.stop(None)


@pytest.mark.anyio
async def test_a_gateway_waits_for_the_http_port_of_the_one_it_replaces_and_no_longer_than_that() -> None:
    with socket.create_server(("127.0.0.1", 0)) as leaving:
        port = leaving.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be bound .*; name a free port"):
            await listen_when_free("127.0.0.1", port, patience_s=0.0)
        listening = asyncio.create_task(listen_when_free("127.0.0.1", port, patience_s=10.0))
        await asyncio.sleep(0.1)
        assert not listening.done()
    with await listening as listener:
        assert listener.getsockname()[1] == port


@pytest.mark.anyio
async def test_an_address_of_another_machine_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1:0 cannot be bound"):
        await listen_when_free("203.0.113.1", 0, patience_s=10.0)


@pytest.mark.anyio
async def test_a_gateway_whose_watch_has_failed_is_unhealthy_and_still_ends_in_order() -> None:
    async def failing() -> None:
        raise ValueError("a member that cannot be used")

    dispatcher = Dispatcher(Router(), Admission(), "token")
    http_server = HttpServer(PlainTextResponse("ok"), listen("127.0.0.1", 0), drain_s=1.0)
    await http_server.start()
    gateway = RunningGateway(
        service=make_service(dispatcher),
        dispatcher=dispatcher,
        http_server=http_server,
        grpc_server=grpc.aio.server(),
        follower=asyncio.create_task(failing()),
        drain_s=1.0,
    )
    gateway.check_health()
    await asyncio.sleep(0)
    with pytest.raises(MemberLostError, match=r"watch of the directory .* ValueError: a member that cannot be used"):
        gateway.check_health()
    await gateway.stop()
    with pytest.raises(MemberLostError, match="HTTP server has ended without an error"):
        gateway.check_health()


@pytest.mark.anyio
async def test_one_of_several_gateways_tells_that_it_leaves_and_serves_until_it_does() -> None:
    service = make_service(make_backend("x"))
    http_server = HttpServer(create_app(service, HttpConfig()), listen("127.0.0.1", 0), drain_s=1.0)
    await http_server.start()
    gateway = RunningGateway(
        service=service,
        dispatcher=Dispatcher(Router(), Admission(), "token"),
        http_server=http_server,
        grpc_server=grpc.aio.server(),
        follower=asyncio.create_task(asyncio.sleep(60.0)),
        drain_s=1.0,
        leave_s=1.0,
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_server.port}") as client:
        before = [(await client.get(path)).status_code for path in ("/health", "/-/healthz")]
        stopping = asyncio.create_task(gateway.stop())
        await asyncio.sleep(0.1)
        health = await client.get("/health")
        after = [(await client.get("/-/healthz")).status_code, (await client.get("/v1/models")).status_code]
        assert not gateway.follower.done()
        await stopping
        with pytest.raises(httpx.ConnectError):
            await client.get("/v1/models")
    assert (before, health.status_code, after) == ([200, 200], 503, [503, 200])
    assert "is leaving; use another one" in health.json()["reason"]
