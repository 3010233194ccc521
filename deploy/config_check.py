"""Refuses, in seconds and before Ray starts, a ServeConfig that cannot run."""

import errno
import ipaddress
import socket
from contextlib import closing
from pathlib import Path
from typing import Final

from cluster.config import EngineConfig
from deploy.config import ServeConfig, engine_config
from deploy.config_keys import read_api_keys
from deploy.tokenizer import check_tokenizer_file
from router.errors import CheckpointError, ConfigError
from shards.host_memory import available_memory

_LOCAL: Final = "local"
_CONNECT_S: Final = 5.0


def check_config(config: ServeConfig) -> None:
    """Check a config against its checkpoint and, for a local cluster, this machine's memory and ports.

    On an existing cluster members check memory where they are placed, and a checkpoint folder that this machine does
    not have is left to them too.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: names the dotted key, the value and what would do.
    """
    for role, _ in config.pools.roles:
        engine_config(config, role)
    _check_endpoints(config)
    local = config.ray.address == _LOCAL
    if local:
        if config.gateway.replicas > 1:
            raise ConfigError(
                f"gateway.replicas={config.gateway.replicas} with ray.address=local: each gateway listens on the ports "
                "of its node, and a local cluster is one node; use 1, or name a cluster of several (--ray-address)"
            )
        _check_cpus(config)
        for key, host, port in _addresses(config):
            _check_free(key, host, port)
    if local or Path(config.model).exists():
        _check_engines(config, memory=local)
        check_tokenizer_file(Path(config.model))
    if local and config.engine.device == "cuda":
        _check_gpus(config)


def check_ray_address(address: str) -> None:
    """Refuse at once a cluster's HOST:PORT where nothing listens: Ray itself asks for minutes.

    Raises:
        ConfigError: names the address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return  # auto, local, or a form that is Ray's to judge
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray.address: no Ray cluster answers at {address} ({error}); start one, or name it (--ray-address)"
        ) from error


def logical_cpus(config: ServeConfig, *, grown: bool) -> int:
    """Ray CPUs that the ranks of all members take, one for each thread.

    Args:
        grown: with every pool at its largest.
    """
    return sum(
        (pool.most_members if grown else pool.members) * pool.layout.world * (pool.threads or 1)
        for _, pool in config.pools.roles
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _addresses(config: ServeConfig) -> tuple[tuple[str, str, int], ...]:
    return (("http", config.http.host, config.http.port), ("grpc", config.grpc.host, config.grpc.port))


def _check_endpoints(config: ServeConfig) -> None:
    if config.http.port == config.grpc.port:
        raise ConfigError(f"grpc.port: {config.grpc.port} is http.port too; give each its own")
    if config.http.api_keys_file is not None:
        read_api_keys(Path(config.http.api_keys_file))
    for key, host, _ in _addresses(config):
        if config.http.api_keys_file is None and not is_loopback(host):
            raise ConfigError(
                f"{key}.host: {host} is reached from other machines, and there are no keys; name a file of keys in "
                "http.api_keys_file (--api-keys-file), or use 127.0.0.1"
            )
    for key in ("tls_certificate", "tls_key", "tls_client_ca"):
        path: str | None = getattr(config.grpc, key)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"grpc.{key}: there is no file {path}; name a PEM file")


def _check_cpus(config: ServeConfig) -> None:
    given, needed = config.ray.num_cpus, logical_cpus(config, grown=False)
    if given is not None and given < needed:
        raise ConfigError(
            f"ray.num_cpus: {given} is less than the {needed} that the ranks of all members take; raise it "
            "(--num-cpus; more than the machine's cores is allowed), leave it out, or lower members, tp or dp"
        )


def _check_gpus(config: ServeConfig) -> None:
    # Imports torch, as below.
    import torch

    needed = sum(pool.members * pool.layout.world for _, pool in config.pools.roles)
    found = torch.cuda.device_count()
    if found < needed:
        raise ConfigError(
            f"engine.device: cuda needs a GPU for each of the {needed} ranks of all members, torch sees {found} here; "
            "use cpu (--device), lower members, tp or dp, or name a cluster that has them (--ray-address)"
        )


def _check_free(key: str, host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{key}.host: {host} cannot be resolved ({error}); use an address of this machine") from error
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        # As servers do: a port whose last connections have just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"{key}: {host}:{port} cannot be bound ({error.strerror}); use another") from error
            raise ConfigError(
                f"{key}.port: {port} on {host} is in use; stop what uses it or name another (--{key}-port)"
            ) from error


def _check_engines(config: ServeConfig, *, memory: bool) -> None:
    # Imports torch (1.5 s), which a config that is wrong by itself need not wait for.
    from cluster.resolve import resolve_engine, weight_bytes

    needed = 0
    for role, pool in config.pools.roles:
        engine = engine_config(config, role)
        try:
            if memory:
                resolve_engine(engine)
            else:
                _check_layout(engine)
        except ConfigError as error:
            raise ConfigError(f"pools.{role}: {error}") from error
        needed += pool.members * (pool.layout.world * pool.kv_memory + weight_bytes(engine))
    available = available_memory() if memory and config.engine.device == "cpu" else None
    if available is not None and needed > available:
        raise ConfigError(
            f"pools: KV memory and weights of all members need {needed / 2**30:.2f} GiB, this machine has "
            f"{available / 2**30:.2f} GiB available; lower kv_memory (--kv-memory) or members"
        )


def _check_layout(engine: EngineConfig) -> None:
    """What can be told of an engine that runs elsewhere."""
    # As above.
    from shards.cuts import check_layout
    from shards.families import load_model_config
    from shards.int_experts import check_int_experts
    from shards.rank import resolve_deterministic

    try:
        model = load_model_config(engine.model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        deterministic = resolve_deterministic(engine.deterministic, engine.kernels, engine.device)
        model.with_drafts(engine.draft_tokens)
        check_layout(model, engine.layout, deterministic=deterministic, groups=engine.reduction_groups)
        check_int_experts(
            model,
            engine.layout,
            engine.expert_weights,
            device=engine.device,
            kernels=engine.kernels,
            deterministic=deterministic,
            groups=engine.reduction_groups,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
