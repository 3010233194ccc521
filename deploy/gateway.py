"""The gateway: one process's HTTP and gRPC endpoints over a dispatcher that follows the directory."""

import asyncio
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from ray.actor import ActorProxy
from ray.exceptions import RayError

from cluster.directory import Directory, Membership, open_directory
from cluster.dispatcher import Dispatcher
from cluster.members import MemberInfo
from deploy.config import ServeConfig
from deploy.config_keys import read_api_keys
from deploy.generation import GenerationService
from deploy.grpc_service import GrpcConfig, TlsFiles, bind_grpc_server, create_grpc_server
from deploy.http_guard import ApiKey
from deploy.http_server import HttpServer, PortTakenError, listen
from deploy.metrics import GatewayMetrics
from deploy.openai_routes import HttpConfig, create_app
from deploy.served_model import load_served_model
from deploy.tokenizer import load_tokenizer
from router.admission import Admission, AdmissionConfig
from router.errors import ConfigError, MemberLostError
from router.router import Router

logger = logging.getLogger(__name__)
LEAVE_S: Final = 10.0
"""One of several gateways says so long that it leaves before it does: who sends requests to it asks now and then."""
_WATCH_S: Final = 10.0
_RETRY_S: Final = 0.5
_BIND_MARGIN_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    """A gateway that serves, until it is stopped."""

    service: GenerationService
    dispatcher: Dispatcher
    http_server: HttpServer
    grpc_server: grpc.aio.Server
    follower: asyncio.Task[None]
    drain_s: float
    leave_s: float = 0.0
    """Health tells so long that it leaves before its ports are closed."""

    def check_health(self) -> None:
        """Raises MemberLostError, which tells why, when the HTTP server or the watch of the directory has ended."""
        if self.http_server.has_ended:
            raise _lost("HTTP server", self.http_server.failure)
        if self.follower.done():
            raise _lost("watch of the directory", None if self.follower.cancelled() else self.follower.exception())

    async def stop(self) -> None:
        """Take no more requests, let those that run end, and leave all members."""
        self.service.leave()
        await asyncio.sleep(self.leave_s)
        self.follower.cancel()
        # One that failed before does not keep requests from ending in order.
        await asyncio.wait([self.follower])
        await asyncio.gather(self.http_server.stop(), self.grpc_server.stop(self.drain_s))
        await self.dispatcher.close()


def _lost(part: str, failure: BaseException | None) -> MemberLostError:
    why = "without an error" if failure is None else f"by {type(failure).__name__}: {failure}"
    error = MemberLostError(f"the gateway's {part} has ended {why}")
    error.__cause__ = failure
    return error


async def start_gateway(config: ServeConfig) -> RunningGateway:
    """Wait until every pool has had a member, then serve HTTP and gRPC.

    Raises:
        ConfigError: a port is in use, or a key file cannot be read.
        CheckpointError: the model's JSON files or tokenizer cannot be used.
    """
    directory = open_directory(config.ray.namespace)
    token = await directory.token.remote()
    membership = await _all_pools(directory, config)
    # A directory that served another layout before may know of other roles.
    max_model_len = min(membership.max_model_len[role] for role, _ in config.pools.roles)
    model = load_served_model(Path(config.model), name=config.served_name, max_model_len=max_model_len)
    metrics = GatewayMetrics(model.name)
    dispatcher = Dispatcher(Router(), Admission(_admission_config(config)), token, on_trace=metrics.stages)
    dispatcher.update_members(membership.members)
    tokenizer = await asyncio.to_thread(load_tokenizer, Path(config.model))
    service = GenerationService(backend=dispatcher, tokenizer=tokenizer, model=model, metrics=metrics)
    keys = () if config.http.api_keys_file is None else read_api_keys(Path(config.http.api_keys_file))
    grpc_config = _grpc_config(config, keys)
    server = create_grpc_server(service, grpc_config)
    drain_s = max(pool.drain_s for _, pool in config.pools.roles)
    await bind_when_free(server, grpc_config, patience_s=drain_s + _BIND_MARGIN_S)
    listener = await listen_when_free(config.http.host, config.http.port, patience_s=_BIND_MARGIN_S)
    http_server = HttpServer(create_app(service, _http_config(config, keys)), listener, drain_s=drain_s)
    await server.start()
    await http_server.start()
    return RunningGateway(
        service=service,
        dispatcher=dispatcher,
        http_server=http_server,
        grpc_server=server,
        follower=asyncio.create_task(_follow(directory, dispatcher, membership)),
        drain_s=drain_s,
        leave_s=LEAVE_S if config.gateway.replicas > 1 else 0.0,
    )


async def listen_when_free(host: str, port: int, *, patience_s: float) -> socket.socket:
    """As `listen`; a gateway that is being replaced gives the port up when it begins to leave.

    Raises:
        ConfigError: the address is still in use after `patience_s`, or not ours.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return listen(host, port)
        except PortTakenError as error:
            if time.monotonic() > until:
                raise
            logger.warning("%s; waiting for a gateway that leaves", error)
        await asyncio.sleep(_RETRY_S)


async def bind_when_free(server: grpc.aio.Server, config: GrpcConfig, *, patience_s: float) -> int:
    """Take the gRPC address; returns the port. A gateway that is being replaced gives it up when it begins to leave.

    Raises:
        ConfigError: the address is still in use after `patience_s`, or a TLS file cannot be read.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return bind_grpc_server(server, config)
        except ConfigError as error:
            # A file that cannot be read will not be readable later.
            if isinstance(error.__cause__, OSError) or time.monotonic() > until:
                raise
            logger.warning("%s; waiting for a gateway that leaves", error)
        await asyncio.sleep(_RETRY_S)


async def _all_pools(directory: "ActorProxy[Directory]", config: ServeConfig) -> Membership:
    """The membership once each role of the config has had a member: only then is the longest request known."""
    roles = {role for role, _ in config.pools.roles}
    version = -1
    while True:
        membership = await directory.watch.remote(version, _WATCH_S)
        if roles <= membership.max_model_len.keys():
            return membership
        version = membership.version


async def _follow(directory: "ActorProxy[Directory]", dispatcher: Dispatcher, known: Membership) -> None:
    """Tell the dispatcher of every change; a directory that is away is asked again, members serve on meanwhile."""
    members, version = known.members, known.version
    while True:
        try:
            membership = await directory.watch.remote(version, _WATCH_S)
        except RayError as error:
            logger.warning("the directory does not answer: %s", str(error).partition("\n")[0])
            version = -1
            await asyncio.sleep(_RETRY_S)
            continue
        if membership.version != version:
            members = members_to_serve(members, membership)
            dispatcher.update_members(members)
        version = membership.version


def members_to_serve(known: tuple[MemberInfo, ...], told: Membership) -> tuple[MemberInfo, ...]:
    """The directory's members; after its restart also those it has not heard of again yet, whose streams live on."""
    if told.settled:
        return told.members
    return tuple({info.member_id: info for info in (*known, *told.members)}.values())


def _admission_config(config: ServeConfig) -> AdmissionConfig:
    return AdmissionConfig(
        max_in_flight=config.gateway.max_in_flight,
        max_queue=config.gateway.max_queue,
        gateways=config.gateway.replicas,
        tenant_weights=config.gateway.tenant_weights,
    )


def _http_config(config: ServeConfig, keys: tuple[ApiKey, ...]) -> HttpConfig:
    return HttpConfig(
        api_keys=keys,
        max_body_bytes=config.http.max_body_bytes,
        request_timeout_s=config.http.request_timeout_s,
        split_reasoning=config.http.split_reasoning,
    )


def _grpc_config(config: ServeConfig, keys: tuple[ApiKey, ...]) -> GrpcConfig:
    given = config.grpc
    tls = None
    if given.tls_certificate is not None and given.tls_key is not None:
        client_ca = None if given.tls_client_ca is None else Path(given.tls_client_ca)
        tls = TlsFiles(certificate=Path(given.tls_certificate), key=Path(given.tls_key), client_ca=client_ca)
    return GrpcConfig(
        host=given.host,
        port=given.port,
        api_keys=keys,
        max_message_bytes=given.max_message_bytes,
        max_concurrent_calls=given.max_concurrent_calls,
        request_timeout_s=config.http.request_timeout_s,
        tls=tls,
    )
