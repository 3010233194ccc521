"""The gRPC API: moefleet.v1 with grpc.health.v1 and reflection, over the same service and checks as HTTP."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from typing_extensions import override

from deploy.error_replies import AuthenticationError, ErrorReply, error_reply
from deploy.generation import GenerationService, UsageCount
from deploy.grpc_input import delta_response, generation_input, usage_response
from deploy.http_guard import ApiKey, KeyRing
from deploy.protos import moefleet_v1_pb2 as pb
from deploy.protos import moefleet_v1_pb2_grpc as pb_grpc
from router.errors import ConfigError, MoefleetError

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Generation"].full_name
_HEALTH_PREFIX = f"/{health.SERVICE_NAME}/"
# The generated code and the health package leave a call's message types open.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Certificate chain and private key, PEM; a client CA makes clients prove themselves."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcConfig:
    """How the gRPC API is served."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 lets the system choose."""
    api_keys: Sequence[ApiKey] = ()
    """Where there are any, every call but health needs `authorization: Bearer KEY` in its metadata."""
    max_message_bytes: int = 16 * 2**20
    max_concurrent_calls: int = 4096
    request_timeout_s: float | None = None
    """For calls without a deadline; None waits as long as the client does."""
    health_interval_s: float = 1.0
    """How often the health service asks the back end."""
    tls: TlsFiles | None = None


class GenerationServicer(pb_grpc.GenerationServicer):
    """moefleet.v1.Generation."""

    def __init__(self, service: GenerationService, config: GrpcConfig) -> None:
        self._service = service
        self._keys = KeyRing(config.api_keys)
        self._timeout_s = config.request_timeout_s

    @override
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Serve one request; closing the call aborts it."""
        try:
            tenant = self._keys.tenant(_authorization(context.invocation_metadata()))
            self._service.check_room(tenant, request.priority)
            given = generation_input(request, tenant=tenant, deadline_unix_s=self._deadline(context))
            generation = await self._service.prepare(given)
            usage = UsageCount(generation)
            async with aclosing(self._service.stream(generation)) as deltas:
                async for delta in deltas:
                    usage.add(delta)
                    yield delta_response(generation, delta)
            yield usage_response(generation, usage)
        except MoefleetError as error:
            reply = error_reply(error)
            self._service.metrics.error("grpc", reply.code)
            await _abort(context, reply)
        except (asyncio.CancelledError, GeneratorExit):
            self._service.metrics.client_left()
            raise

    @override
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """The one model served here."""
        model = self._service.model
        entry = pb.Model(name=model.name, max_model_len=model.max_model_len, vocab_size=model.vocab_size)
        return pb.ListModelsResponse(models=[entry])

    @override
    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        """The latest load of every member."""
        members = [
            pb.MemberLoad(
                member_id=str(load.member_id),
                role=load.role,
                waiting_requests=load.waiting_requests,
                running_requests=load.running_requests,
                max_requests=load.max_requests,
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                draining=load.draining,
            )
            for load in self._service.loads()
        ]
        return pb.GetLoadResponse(members=members)

    def _deadline(self, context: Context) -> float | None:
        remaining_s = context.time_remaining()
        if remaining_s is None:
            remaining_s = self._timeout_s
        return None if remaining_s is None else time.time() + remaining_s


class HealthServicer(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, answered from the back end's own check."""

    def __init__(self, service: GenerationService, *, interval_s: float) -> None:
        self._service = service
        self._interval_s = interval_s

    @override
    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The state now; the empty name means the whole server."""
        if request.service not in ("", SERVICE_NAME):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: {request.service[:200]!r} is not served here")
        return health_pb2.HealthCheckResponse(status=await self._status())

    @override
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and after each change."""
        known = request.service in ("", SERVICE_NAME)
        last: health_pb2.HealthCheckResponse.ServingStatus | None = None
        while True:
            status = await self._status() if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(self._interval_s)

    async def _status(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        report = await self._service.health()
        response = health_pb2.HealthCheckResponse
        return response.SERVING if report.ready else response.NOT_SERVING


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call but health without a known key, unknown methods and reflection among them."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = KeyRing(keys)

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Pass the call on, or give it a handler that refuses."""
        if handler_call_details.method.startswith(_HEALTH_PREFIX):
            return await continuation(handler_call_details)
        try:
            self._keys.tenant(_authorization(handler_call_details.invocation_metadata))
        except AuthenticationError as error:
            return _refusing(await continuation(handler_call_details), error_reply(error))
        return await continuation(handler_call_details)


def create_grpc_server(service: GenerationService, config: GrpcConfig) -> grpc.aio.Server:
    """Make the server; `bind_grpc_server` gives it its address, `start()` starts it."""
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # Without it a second server on the port would take half of the first one's clients.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(
        interceptors=[KeyInterceptor(config.api_keys)],
        options=options,
        maximum_concurrent_rpcs=config.max_concurrent_calls,
    )
    pb_grpc.add_GenerationServicer_to_server(GenerationServicer(service, config), server)
    servicer = HealthServicer(service, interval_s=config.health_interval_s)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def bind_grpc_server(server: grpc.aio.Server, config: GrpcConfig) -> int:
    """Give the server its address; returns the port.

    Raises:
        ConfigError: the address is in use or not ours, or a TLS file cannot be read.
    """
    address = f"{config.host}:{config.port}"
    credentials = None if config.tls is None else _credentials(config.tls)
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"grpc address {address} cannot be bound: is another server on it? Name a free port"
        ) from error


def _credentials(files: TlsFiles) -> grpc.ServerCredentials:
    try:
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        client_ca = None if files.client_ca is None else files.client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"grpc tls: {error.filename} cannot be read ({error.strerror})") from error
    return grpc.ssl_server_credentials([pair], root_certificates=client_ca, require_client_auth=client_ca is not None)


def _authorization(metadata: Metadata | None) -> str:
    found = next((value for key, value in metadata or () if key == "authorization"), "")
    return found if isinstance(found, str) else ""


async def _abort(context: Context, reply: ErrorReply) -> None:
    trailing: list[tuple[str, str]] = [("moefleet-code", reply.code)]
    if reply.param is not None:
        # Metadata is ASCII; a field name can hold a client's own text.
        trailing.append(("moefleet-field", reply.param.encode("ascii", "backslashreplace").decode()))
    if reply.retry_after_s is not None:
        trailing.append(("retry-after", str(max(1, math.ceil(reply.retry_after_s)))))
    await context.abort(grpc.StatusCode[reply.grpc_code], reply.message, tuple(trailing))


def _refusing(handler: Handler, reply: ErrorReply) -> Handler:
    """A handler of the same kind that aborts every call; gRPC needs the kinds to agree."""

    async def refuse_unary(_: object, context: Context) -> None:
        await _abort(context, reply)

    async def refuse_stream(_: object, context: Context) -> AsyncIterator[object]:
        await _abort(context, reply)
        yield None

    unary: Callable[..., Any] = refuse_unary
    stream: Callable[..., Any] = refuse_stream
    if handler is not None and handler.response_streaming:
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_stream_rpc_method_handler(stream)
    if handler is not None and handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(unary)
    return grpc.unary_unary_rpc_method_handler(unary)
