"""The gRPC API as its clients see it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.protos.generate import ROOT, compile_proto
from deploy.generation import Backend
from deploy.grpc_service import SERVICE_NAME, GrpcConfig, TlsFiles, bind_grpc_server, create_grpc_server
from deploy.http_guard import ApiKey
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from deploy.protos.generate import PROTO
from router.errors import ConfigError, CorruptDataError, MemberLostError, MoefleetError, NoMemberError, OverloadedError
from tests.support.scripted_backend import Script
from tests.support.serving import make_backend, make_service, make_tokenizer, text_script

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running server's channel and stub."""

    channel: grpc.aio.Channel
    stub: "pb_grpc.GenerationAsyncStub"


@asynccontextmanager
async def served(backend: Backend, config: GrpcConfig | None = None) -> AsyncIterator[Served]:
    config = config or GrpcConfig(health_interval_s=0.01)
    server = create_grpc_server(make_service(backend), config)
    port = bind_grpc_server(server, config)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(channel=channel, stub=pb_grpc.GenerationStub(channel))
    finally:
        await server.stop(None)


def make_request(**fields: object) -> pb.GenerateRequest:
    return ParseDict({"model": "tiny", "text": "hi", **fields}, pb.GenerateRequest())


async def collect(
    client: Served, request: pb.GenerateRequest, timeout_s: float | None = None
) -> list[pb.GenerateResponse]:
    return [response async for response in client.stub.Generate(request, timeout=timeout_s)]


async def failure(client: Served, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(client, request)
    return caught.value


def health_stub(client: Served) -> Any:
    # The package's types do not know the methods.
    return health_pb2_grpc.HealthStub(client.channel)


def reflection_stub(client: Served) -> Any:
    make: Any = reflection_pb2_grpc.ServerReflectionStub
    return make(client.channel)


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata() or ())


async def until_idle(backend: object) -> None:
    async with asyncio.timeout(1):
        while getattr(backend, "running", 0):
            await asyncio.sleep(0.001)


async def test_text_comes_as_a_stream_that_ends_with_usage() -> None:
    script = Script(token_ids=text_script("hello there").token_ids, cached_tokens=1)
    async with served(make_backend(script)) as client:
        responses = await collect(client, make_request())

    assert "".join(each.text for each in responses) == "hello there"
    assert [token for each in responses for token in each.token_ids] == list(script.token_ids)
    assert [each.finish_reason for each in responses[-2:]] == [pb.FINISH_REASON_STOP, pb.FINISH_REASON_UNSPECIFIED]
    assert [each.HasField("usage") for each in responses] == [False] * (len(responses) - 1) + [True]
    usage = responses[-1].usage
    assert (usage.completion_tokens, usage.cached_tokens) == (len(script.token_ids), 1)


async def test_text_messages_and_token_ids_become_the_prompts_that_http_makes_of_them() -> None:
    backend = make_backend("x")
    tokenizer = make_tokenizer()
    chat = {"messages": [{"role": "user", "content": "hi"}], "enableThinking": False}
    async with served(backend) as client:
        await collect(client, make_request())
        await collect(client, ParseDict({"model": "tiny", "tokenIds": {"ids": [5, 6]}}, pb.GenerateRequest()))
        await collect(client, ParseDict({"model": "tiny", "chat": chat}, pb.GenerateRequest()))

    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert [each.prompt_ids for each in backend.requests] == [
        tokenizer.encode("hi"),
        (5, 6),
        tokenizer.encode(rendered),
    ]


async def test_sampling_reaches_the_back_end_and_zero_is_not_absent() -> None:
    backend = make_backend("x")
    sampling = {
        "temperature": 0.0,
        "topP": 0.5,
        "topK": 7,
        "seed": 3,
        "maxTokens": 9,
        "minTokens": 1,
        "logitBias": {"5": 1.5},
        "ignoreEos": True,
    }
    async with served(backend) as client:
        await collect(client, make_request(sampling=sampling, priority=2))
        await collect(client, make_request())

    given, default = (each.sampling for each in backend.requests)
    assert (given.temperature, given.top_p, given.top_k, given.seed) == (0.0, 0.5, 7, 3)
    assert (given.max_tokens, given.min_tokens, given.logit_bias) == (9, 1, ((5, 1.5),))
    assert given.stop_token_ids == ()
    assert (default.temperature, default.max_tokens) == (1.0, 256 - len(backend.requests[1].prompt_ids))
    assert [each.priority for each in backend.requests] == [2, 0]


async def test_choices_carry_their_index_and_stop_strings_end_them() -> None:
    backend = make_backend(Script(token_ids=make_tokenizer().encode("a STOP "), endless=True))
    async with served(backend) as client:
        responses = await collect(client, make_request(n=2, stop=["STOP"]))

    for index in (0, 1):
        assert "".join(each.text for each in responses if each.index == index and not each.HasField("usage")) == "a "
    assert len(backend.aborted) == 2


async def test_logprobs_of_output_and_prompt_are_given_where_asked_for() -> None:
    async with served(make_backend("x")) as client:
        responses = await collect(client, make_request(sampling={"logprobs": 2, "promptLogprobs": 0}))

    first = responses[0]
    assert [each.token_id for each in first.logprobs] == list(first.token_ids)
    assert len(first.logprobs[0].top_ids) == 2
    assert [each.known for each in first.prompt_logprobs] == [False] + [True] * (len(first.prompt_logprobs) - 1)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"sampling": {"temperature": 9}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        ({"sampling": {"maxTokens": 500}}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        ({"sampling": {"logprobs": 21}}, grpc.StatusCode.INVALID_ARGUMENT, "top_logprobs"),
        ({"text": "y " * 500}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"n": 100}, grpc.StatusCode.INVALID_ARGUMENT, "n"),
        ({"stop": [""]}, grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        ({"model": "gpt"}, grpc.StatusCode.NOT_FOUND, "model"),
    ],
)
async def test_bad_input_is_refused_with_the_field_in_the_metadata(
    fields: dict[str, object], code: grpc.StatusCode, field: str
) -> None:
    async with served(make_backend("x")) as client:
        error = await failure(client, make_request(**fields))

    assert (error.code(), trailing(error)["moefleet-field"]) == (code, field)


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "chat.messages[0].role"),
        ({"messages": [{"role": "user", "content": "x"}], "toolsJson": ["{"]}, "chat.tools_json[0]"),
        (
            {"messages": [{"role": "assistant", "toolCalls": [{"name": "f", "argumentsJson": "[]"}]}]},
            "chat.messages[0].tool_calls[0].arguments_json",
        ),
    ],
)
async def test_bad_chats_are_refused_with_the_path_of_the_field(chat: dict[str, object], field: str) -> None:
    async with served(make_backend("x")) as client:
        error = await failure(client, ParseDict({"model": "tiny", "chat": chat}, pb.GenerateRequest()))

    assert (error.code(), trailing(error)["moefleet-field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_request_without_input_or_with_unknown_fields_is_refused() -> None:
    unknown = pb.GenerateRequest.FromString(make_request().SerializeToString() + b"\xa0\x06\x01")
    async with served(make_backend("x")) as client:
        assert trailing(await failure(client, pb.GenerateRequest(model="tiny")))["moefleet-field"] == "input"
        error = await failure(client, unknown)

    assert "field number 100" in (error.details() or "")


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [
        (OverloadedError("too much", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "3"),
        (MemberLostError("gone"), grpc.StatusCode.UNAVAILABLE, "1"),
        (NoMemberError("none"), grpc.StatusCode.UNAVAILABLE, "1"),
        (CorruptDataError("/secret"), grpc.StatusCode.INTERNAL, None),
    ],
)
async def test_failures_have_their_codes_and_retry_times(
    error: MoefleetError, code: grpc.StatusCode, retry_after: str | None
) -> None:
    async with served(make_backend(Script(token_ids=(65,), error=error))) as client:
        seen = await failure(client, make_request())

    assert (seen.code(), trailing(seen).get("retry-after")) == (code, retry_after)
    assert "secret" not in (seen.details() or "")


async def test_a_cancelled_call_aborts_its_request() -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.01))
    async with served(backend) as client:
        call = client.stub.Generate(make_request(n=2))
        await anext(aiter(call))
        call.cancel()
        await until_idle(backend)

    assert len(backend.aborted) == 2


async def test_the_deadline_of_a_call_is_the_deadline_of_its_request() -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.01))
    async with served(backend) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(client, make_request(), timeout_s=0.2)
        await until_idle(backend)

    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert backend.requests[0].deadline_unix_s is not None


async def test_a_server_that_ends_long_calls_says_so() -> None:
    backend = make_backend(Script(token_ids=(65,), endless=True, delay_s=0.01))
    async with served(backend, GrpcConfig(request_timeout_s=0.1)) as client:
        error = await failure(client, make_request())

    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_message_over_the_limit_is_refused() -> None:
    async with served(make_backend("x"), GrpcConfig(max_message_bytes=100)) as client:
        error = await failure(client, make_request(text="x" * 200))

    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_models_and_loads_are_told() -> None:
    async with served(make_backend("x")) as client:
        (model,) = (await client.stub.ListModels(pb.ListModelsRequest())).models
        (member,) = (await client.stub.GetLoad(pb.GetLoadRequest())).members

    assert (model.name, model.max_model_len, model.vocab_size) == ("tiny", 256, 512)
    assert (member.member_id, member.role, member.free_blocks) == ("member-0", "mixed", 75)


async def test_health_follows_the_back_end_and_watchers_hear_of_changes() -> None:
    backend = make_backend("x")
    async with served(backend) as client:
        stub = health_stub(client)
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        watch = stub.Watch(request)
        states = [(await anext(aiter(watch))).status, (await stub.Check(request)).status]
        backend.unhealthy = NoMemberError("none")
        states.append((await anext(aiter(watch))).status)
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))

    response = health_pb2.HealthCheckResponse
    assert states == [response.SERVING, response.SERVING, response.NOT_SERVING]
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services() -> None:
    async with served(make_backend("x")) as client:
        stub = reflection_stub(client)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        names = [service.name for service in (await anext(aiter(call))).list_services_response.service]

    assert SERVICE_NAME == "moefleet.v1.Generation"
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(names)


async def test_every_call_but_health_is_denied_without_a_known_key() -> None:
    backend = make_backend("x")
    async with served(backend, GrpcConfig(api_keys=(ApiKey(key="k", tenant="a"),))) as client:
        for metadata in (None, (("authorization", "Bearer wrong"),)):
            calls = [
                client.stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                client.stub.GetLoad(pb.GetLoadRequest(), metadata=metadata),
                anext(aiter(client.stub.Generate(make_request(), metadata=metadata))),
                client.channel.unary_unary("/moefleet.v1.Generation/Nothing")(b"", metadata=metadata),
                anext(
                    aiter(
                        reflection_stub(client).ServerReflectionInfo(
                            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
                        )
                    )
                ),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        health = health_stub(client)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        accepted = client.stub.Generate(make_request(), metadata=(("authorization", "Bearer k"),))
        assert [response async for response in accepted]

    assert [each.tenant for each in backend.requests] == ["a"]


async def test_a_port_in_use_is_refused_by_name() -> None:
    first = create_grpc_server(make_service(make_backend("x")), GrpcConfig())
    port = bind_grpc_server(first, GrpcConfig())
    await first.start()
    config = GrpcConfig(port=port)
    second = create_grpc_server(make_service(make_backend("x")), config)

    with pytest.raises(ConfigError, match=str(port)):
        bind_grpc_server(second, config)
    await first.stop(None)
    await second.stop(None)


async def test_a_missing_tls_file_is_refused_by_name(tmp_path: Path) -> None:
    tls = TlsFiles(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    config = GrpcConfig(tls=tls)
    server = create_grpc_server(make_service(make_backend("x")), config)

    with pytest.raises(ConfigError, match=r"key\.pem"):
        bind_grpc_server(server, config)
    await server.stop(None)


def test_the_committed_protobuf_code_is_what_the_compiler_makes(tmp_path: Path) -> None:
    for file in compile_proto(PROTO, tmp_path):
        assert file.read_text() == (ROOT / file.relative_to(tmp_path)).read_text(), file.name
