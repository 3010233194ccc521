"""Bounds, deadlines and priority classes as clients of both APIs meet them: gateway, admission and router are real."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import grpc
import httpx
import pytest
from google.protobuf.json_format import ParseDict

from cluster.dispatcher import Dispatcher
from deploy.grpc_service import GrpcConfig, bind_grpc_server, create_grpc_server
from deploy.openai_routes import HttpConfig
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from router.admission import Admission, AdmissionConfig
from router.errors import OverloadedError
from router.request import Request, RequestId, SamplingParams
from router.router import Router
from tests.support.fleet import TOKEN, ScriptedMember, until
from tests.support.http import client_of
from tests.support.serving import make_service

pytestmark = pytest.mark.anyio

LONG = {"token_ids": [5] * 90, "max_tokens": 160}
"""Eight of these fill a step of the member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a client is told."""

    status: str
    """`ok`, `overloaded` or `late`, whatever the API calls it."""
    took_s: float
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """One gateway before one member, with both APIs."""

    member: ScriptedMember
    dispatcher: Dispatcher
    http: httpx.AsyncClient
    rpc: "pb_grpc.GenerationAsyncStub"

    async def ask_http(self, *, priority: int = 0, timeout_s: float = 0.0) -> Reply:
        """A completion; its time limit is the gateway's."""
        del timeout_s
        began = time.perf_counter()
        body = {"model": "tiny", "prompt": LONG["token_ids"], "max_tokens": LONG["max_tokens"], "priority": priority}
        reply = await self.http.post("/v1/completions", json={**body, "ignore_eos": True})
        status = {200: "ok", 429: "overloaded", 504: "late"}[reply.status_code]
        after = reply.headers.get("retry-after")
        return Reply(status=status, took_s=time.perf_counter() - began, retry_after_s=after and int(after))

    async def ask_rpc(self, *, priority: int = 0, timeout_s: float = 0.0) -> Reply:
        """A call with a deadline of its own."""
        began = time.perf_counter()
        fields = {"model": "tiny", "tokenIds": {"ids": LONG["token_ids"]}, "priority": priority}
        sampling = {"maxTokens": LONG["max_tokens"], "ignoreEos": True}
        request = ParseDict({**fields, "sampling": sampling}, pb.GenerateRequest())
        status, after = "ok", None
        try:
            async for _ in self.rpc.Generate(request, timeout=timeout_s or None):
                pass
        except grpc.aio.AioRpcError as error:
            codes = {grpc.StatusCode.RESOURCE_EXHAUSTED: "overloaded", grpc.StatusCode.DEADLINE_EXCEEDED: "late"}
            status = codes[error.code()]
            after = dict(error.trailing_metadata() or ()).get("retry-after")
        return Reply(status=status, took_s=time.perf_counter() - began, retry_after_s=int(after) if after else None)

    def flood(self, count: int) -> list["asyncio.Task[float]"]:
        """So many requests at once; each task gives the time of the first token."""
        return [asyncio.create_task(self._first_token(f"flood{number}")) for number in range(count)]

    async def _first_token(self, name: str) -> float:
        sampling = SamplingParams(max_tokens=160, temperature=0.0)
        request = Request(id=RequestId(name), prompt_ids=(5,) * 90, sampling=sampling)
        async with aclosing(self.dispatcher.generate(request)) as events:
            first_s = 0.0
            async for _ in events:
                first_s = first_s or time.perf_counter()
        return first_s


@asynccontextmanager
async def gateway(
    admission: AdmissionConfig, *, step_s: float = 0.002, timeout_s: float | None = None
) -> AsyncIterator[Gateway]:
    member = ScriptedMember("m", step_s=step_s)
    dispatcher = Dispatcher(Router(), Admission(admission), TOKEN)
    server = create_grpc_server(make_service(dispatcher), GrpcConfig())
    port = bind_grpc_server(server, GrpcConfig(port=0))
    dispatcher.update_members([await member.start()])
    await server.start()
    try:
        await until(lambda: len(dispatcher.loads()) == 1)
        async with (
            client_of(dispatcher, HttpConfig(request_timeout_s=timeout_s)) as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            yield Gateway(member=member, dispatcher=dispatcher, http=http, rpc=pb_grpc.GenerationStub(channel))
    finally:
        await server.stop(None)
        await dispatcher.close()
        await member.stop()


async def cancel(tasks: list["asyncio.Task[float]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


Ask = Callable[..., Awaitable[Reply]]


def both(up: Gateway) -> tuple[Ask, Ask]:
    return up.ask_http, up.ask_rpc


async def test_one_too_many_is_refused_at_once_with_the_time_after_which_a_turn_is_predicted() -> None:
    # A step of 0.2 s gives eight requests of 250 tokens their first tokens: 10,000 a second.
    async with gateway(AdmissionConfig(max_in_flight=130), step_s=0.2) as up:
        tasks = up.flood(130)
        await asyncio.sleep(1.1)
        asked_s = time.perf_counter()
        replies = [await ask() for ask in both(up)]
        with pytest.raises(OverloadedError) as caught:
            await up._first_token("probe")
        waiting = up.dispatcher.waiting()[0]
        await until(lambda: not up.dispatcher.waiting()[0], timeout_s=20.0)
        turn_s = time.perf_counter() - asked_s
        await cancel(tasks)
    assert waiting > 40
    for reply in replies:
        assert reply.status == "overloaded"
        assert reply.took_s < 0.4
        assert reply.retry_after_s == pytest.approx(caught.value.retry_after_s, abs=1.0)
    # What was predicted is when the last of those who waited had its turn.
    assert turn_s > 1.0
    assert caught.value.retry_after_s == pytest.approx(turn_s, rel=0.5)


async def test_who_cannot_have_its_turn_in_time_is_told_so_at_once() -> None:
    async with gateway(AdmissionConfig(), step_s=0.2, timeout_s=0.7) as up:
        tasks = up.flood(130)
        await asyncio.sleep(0.9)
        # Two seconds of others are before it.
        replies = [await ask(timeout_s=0.7) for ask in both(up)]
        await cancel(tasks)
    assert [reply.status for reply in replies] == ["late"] * 2
    assert all(reply.took_s < 0.4 for reply in replies)


async def test_who_waits_in_vain_is_told_so_at_its_deadline() -> None:
    async with gateway(AdmissionConfig(), timeout_s=0.7) as up:
        up.member.engine.hold.set()
        tasks = up.flood(20)
        replies = await asyncio.gather(*(ask(timeout_s=0.7) for ask in both(up)))
        assert up.dispatcher.waiting()[0] > 5
        await cancel(tasks)
    assert [reply.status for reply in replies] == ["late"] * 2
    assert all(0.65 < reply.took_s < 1.2 for reply in replies)


@pytest.mark.parametrize("api", [0, 1])
async def test_priority_classes_go_first_over_each_api_and_the_last_does_not_starve(api: int) -> None:
    async with gateway(AdmissionConfig()) as up:
        ask = both(up)[api]
        up.member.engine.hold.set()
        order: list[int] = []

        async def one(priority: int) -> None:
            assert (await ask(priority=priority)).status == "ok"
            order.append(priority)

        blocking = [asyncio.create_task(one(0)) for _ in range(16)]
        await asyncio.sleep(0.2)
        tasks = [asyncio.create_task(one(priority)) for _ in range(30) for priority in (-1, 0, 1)]
        await until(lambda: sum(up.dispatcher.waiting().values()) >= 90)
        up.member.engine.hold.clear()
        await asyncio.wait_for(asyncio.gather(*blocking, *tasks), 30.0)
    order = order[16:]
    places = {each: [index for index, found in enumerate(order) if found == each] for each in (-1, 0, 1)}
    means = {each: sum(found) / len(found) for each, found in places.items()}
    assert means[1] < means[0] < means[-1]
    # The lowest class has its turns beside the others, not behind them.
    assert places[-1][0] < places[0][-1]


async def test_who_is_refused_anyway_is_not_read() -> None:
    async with gateway(AdmissionConfig(max_queue=20)) as up:
        up.member.engine.hold.set()
        tasks = up.flood(20)
        await until(lambda: up.dispatcher.waiting()[0] > 5)
        headers = {"content-type": "application/json"}
        refused = await up.http.post("/v1/completions", content=b"this is no JSON", headers=headers)
        # What names a priority may belong to a class that has room.
        read = await up.http.post("/v1/completions", content=b'{"priority": 1, this is none', headers=headers)
        await cancel(tasks)
        again = await up.http.post("/v1/completions", content=b"this is no JSON", headers=headers)
    assert (refused.status_code, read.status_code, again.status_code) == (429, 400, 400)
    assert int(refused.headers["retry-after"]) >= 1


async def test_the_body_of_who_is_refused_whatever_it_asks_for_is_not_taken() -> None:
    taken: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        for part in (b"this ", b"is no ", b"JSON"):
            taken.append(part)
            yield part

    async with gateway(AdmissionConfig(max_in_flight=1, max_queue=1)) as up:
        up.member.engine.hold.set()
        tasks = up.flood(1)
        await asyncio.sleep(0.2)
        assert not up.dispatcher.waiting()[0]
        refused = await up.http.post("/v1/completions", content=chunks())
        await cancel(tasks)
    assert (refused.status_code, taken) == (429, [])
