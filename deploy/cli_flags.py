"""Which config key each flag of `moefleet serve` sets, and how flags go over a config file."""

import copy
from collections.abc import Mapping
from typing import Final

from router.errors import ConfigError

_POOL_FLAGS: Final = {
    f"{role}_{name}": f"pools.{role}.{name}"
    for role in ("prefill", "decode", "mixed")
    for name in ("members", "max_members", "tp", "dp", "ep")
}
FLAG_KEYS: Final[Mapping[str, str]] = {
    "model": "model",
    "model_name": "model_name",
    **_POOL_FLAGS,
    "kv_memory": "pools.*.kv_memory",
    "max_rows": "pools.*.max_rows",
    "max_step_tokens": "pools.*.max_step_tokens",
    "chunk_tokens": "pools.*.chunk_tokens",
    "dtype": "engine.dtype",
    "state_dtype": "engine.state_dtype",
    "expert_weights": "engine.expert_weights",
    "device": "engine.device",
    "kernels": "engine.kernels",
    "deterministic": "engine.deterministic",
    "max_model_len": "engine.max_model_len",
    "block_size": "engine.block_size",
    "prefix_cache": "engine.prefix_cache",
    "state_checkpoints": "engine.state_checkpoints",
    "draft_tokens": "engine.draft_tokens",
    "gateways": "gateway.replicas",
    "http_host": "http.host",
    "http_port": "http.port",
    "api_keys_file": "http.api_keys_file",
    "grpc_host": "grpc.host",
    "grpc_port": "grpc.port",
    "ray_address": "ray.address",
    "num_cpus": "ray.num_cpus",
}
"""Flag, as its parameter is called, to dotted key; `*` is every pool."""
_SPLIT: Final = ("prefill", "decode")


def overlay(mapping: Mapping[str, object], flags: Mapping[str, object]) -> dict[str, object]:
    """A config file's mapping with flags put over it; a flag that is None was not given.

    A flag of the prefill or decode pool brings both pools about, where the file has none.

    Raises:
        ConfigError: the file holds a plain value where keys belong.
    """
    merged = copy.deepcopy(dict(mapping))
    given = {FLAG_KEYS[name]: value for name, value in flags.items() if name in FLAG_KEYS and value is not None}
    roles = {key.split(".")[1] for key in given if key.startswith("pools.")}
    if roles & set(_SPLIT):
        _add_pools(merged, _SPLIT)
    elif "mixed" in roles:
        _add_pools(merged, ("mixed",))
    elif "*" in roles and not _inner(merged, "pools"):
        _add_pools(merged, _SPLIT)
    for key, value in given.items():
        for dotted in _expand(merged, key):
            _set(merged, dotted, value)
    return merged


def _add_pools(mapping: dict[str, object], roles: tuple[str, ...]) -> None:
    pools = _inner(mapping, "pools")
    for role in roles:
        _inner(pools, role)


def _expand(mapping: dict[str, object], key: str) -> list[str]:
    """The key itself, or one for each pool that is there."""
    if "*" not in key:
        return [key]
    return [key.replace("*", role) for role, pool in _inner(mapping, "pools").items() if pool is not None]


def _set(mapping: dict[str, object], dotted: str, value: object) -> None:
    *path, last = dotted.split(".")
    for part in path:
        mapping = _inner(mapping, part)
    mapping[last] = value


def _inner(mapping: dict[str, object], key: str) -> dict[str, object]:
    """The mapping under a key, made where there is none."""
    if mapping.get(key) is None:
        mapping[key] = {}
    inner = mapping[key]
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}: must hold keys, got {inner!r:.80}")
    return inner
