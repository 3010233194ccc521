"""ServeConfig: everything `moefleet serve` is told, from a YAML file, flags or a Serve config document."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Final, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from cluster.config import (
    MOST_DRAFT_TOKENS,
    DeterministicChoice,
    Device,
    DraftPolicyChoice,
    Dtype,
    EngineConfig,
    ExpertWeights,
    KernelChoice,
    KvTransport,
    StateCheckpoints,
)
from deploy.sizes import parse_bytes
from router.errors import ConfigError
from router.request import Role
from shards.mesh import Layout


def _bytes(value: object) -> object:
    return parse_bytes(value, "in bytes") if isinstance(value, str) else value


Count = Annotated[int, Field(strict=True, ge=1)]
Draft = Annotated[int, Field(strict=True, ge=0, le=MOST_DRAFT_TOKENS)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, gt=0)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Weight = Annotated[float, Field(strict=True, ge=0.001, le=1e6)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
_CLOSED: Final = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class EngineOptions:
    """What all engines share."""

    dtype: Dtype = "bfloat16"
    """Of weights, activations and KV."""
    state_dtype: Dtype = "float32"
    """Of recurrent states between tokens. bfloat16: half the memory, less exact."""
    expert_weights: ExpertWeights = "checkpoint"
    """Of experts: as the checkpoint holds them, or rounded to int8 or int4 when loaded: less memory, less exact."""
    device: Device = "cpu"
    kernels: KernelChoice = "auto"
    """native: C++ for CPUs; torch: plain; auto: the best that runs here."""
    deterministic: DeterministicChoice = "auto"
    """Results of the same bits in every batch, chunking and layout; auto: on where native kernels run."""
    reduction_groups: Count = 4
    """Parts of a row-parallel sum in deterministic mode: the most ranks that may share one."""
    block_size: Count = 16
    """Tokens a KV block."""
    max_model_len: Count | None = None
    """Prompt and output tokens of one request, at most; None: the model's limit, or what fits in the KV."""
    prefix_cache: Flag = True
    """Reuse KV and recurrent state of equal prefixes."""
    state_cache_share: float = 0.25
    """Part of a rank's kv_memory for recurrent states kept for equal prefixes; not used without prefix_cache."""
    state_checkpoints: StateCheckpoints = "exact"
    """How these are kept. int8: three to four times as many fit, and what goes on from one is not exact."""
    draft_tokens: Draft = 0
    """Tokens drafted a row and step by the checkpoint's multi-token prediction head, at most; 0: none."""
    draft_policy: DraftPolicyChoice = "adaptive"
    """adaptive: as many drafts as pay, down to none; always: draft_tokens."""
    lease_s: Seconds = 30.0
    """A prefilled sequence waits this long to be fetched."""
    kv_transport: KvTransport = "auto"
    """How KV comes from prefill members; auto: shared memory on one host, TCP from others, P2P between GPUs."""
    step_timeout_s: Seconds = 60.0
    """A step that takes longer counts as hung, and its member as lost; more than the slowest step takes."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class PoolConfig:
    """Members of one role: each a copy of the model over tp x dp ranks."""

    members: Count = 1
    """Members that run at least."""
    max_members: Count | None = None
    """Members that run at most, by load; None: always `members`."""
    tp: Count = 1
    """Ranks that share one sequence's attention heads."""
    dp: Count = 1
    """Lanes: groups of tp ranks with sequences of their own."""
    ep: Count = 1
    """1: every rank holds a slice of every expert. tp x dp: whole experts spread over all ranks."""
    kv_memory: Bytes = 256 << 20
    """KV and recurrent state of a rank: bytes, or text such as "512MiB"."""
    max_rows: Count = 64
    """Sequences that run at once in a lane."""
    max_step_tokens: Count = 2048
    """Tokens a lane computes in one step, at most."""
    chunk_tokens: Count | None = None
    """Prompt tokens of one sequence in one step, at most; None: max_step_tokens."""
    max_waiting: Count = 1024
    """Requests that wait for room in a member; more are refused."""
    threads: Count | None = None
    """Compute threads a rank; None: the machine's cores shared by the member's ranks."""
    upscale_delay_s: Seconds = 2.0
    """Load must stay high this long before a member is added."""
    downscale_delay_s: Seconds = 30.0
    """Load must stay low this long before a member leaves."""
    drain_s: Seconds = 30.0
    """A leaving member may take this long to finish its requests."""

    def __post_init__(self) -> None:
        if self.max_members is not None and self.max_members < self.members:
            raise ValueError(
                f"max_members={self.max_members} is below members={self.members}; raise max_members or lower members"
            )
        Layout(tp=self.tp, dp=self.dp, ep=self.ep)

    @property
    def layout(self) -> Layout:
        """How one member is cut over its ranks."""
        return Layout(tp=self.tp, dp=self.dp, ep=self.ep)

    @property
    def most_members(self) -> int:
        """Members that may run at once."""
        return self.max_members or self.members


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class PoolsConfig:
    """Either one mixed pool, or a prefill and a decode pool."""

    prefill: PoolConfig | None = None
    decode: PoolConfig | None = None
    mixed: PoolConfig | None = None

    def __post_init__(self) -> None:
        given = {role for role, _ in self.roles}
        if given not in ({"mixed"}, {"prefill", "decode"}):
            raise ValueError(
                f"got {', '.join(sorted(given)) or 'no pool'}; give prefill and decode, or mixed alone "
                "({} takes all defaults)"
            )

    @property
    def roles(self) -> tuple[tuple[Role, PoolConfig], ...]:
        """The pools that are configured, by role."""
        pools: tuple[tuple[Role, PoolConfig | None], ...] = (
            ("prefill", self.prefill),
            ("decode", self.decode),
            ("mixed", self.mixed),
        )
        return tuple((role, pool) for role, pool in pools if pool is not None)


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class GatewayConfig:
    """The processes that clients talk to."""

    replicas: Count = 1
    max_in_flight: Count = 1024
    """Requests a gateway serves at once; more are refused with a time to come again."""
    max_queue: Count = 256
    """Of these, those without a first token."""
    tenant_weights: dict[Text, Weight] = Field(default_factory=dict)
    """What tenants get of a busy fleet, by their names in http.api_keys_file; 1 for those not named."""

    def __post_init__(self) -> None:
        if self.max_queue > self.max_in_flight:
            raise ValueError(
                f"max_queue={self.max_queue} counts within max_in_flight={self.max_in_flight} and cannot be above it; "
                "lower max_queue or raise max_in_flight"
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class HttpOptions:
    """The OpenAI-compatible API."""

    host: Text = "127.0.0.1"
    port: Port = 8000
    max_body_bytes: Bytes = 8 << 20
    """A larger request body is refused: bytes, or text such as "8MiB"."""
    api_keys_file: Text | None = None
    """Keys that clients may use, HTTP and gRPC: one a line, a tenant's name after it if need be."""
    request_timeout_s: Seconds | None = None
    """A request's deadline where the client names none; None: none."""
    split_reasoning: Flag = True
    """Tell thinking apart from the answer; off: all text is content."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class GrpcOptions:
    """The gRPC API moefleet.v1."""

    host: Text = "127.0.0.1"
    port: Port = 9000
    max_message_bytes: Bytes = 16 << 20
    """A larger message is refused: bytes, or text such as "16MiB"."""
    max_concurrent_calls: Count = 4096
    tls_certificate: Text | None = None
    """File of the certificate chain, PEM; with tls_key."""
    tls_key: Text | None = None
    """File of its private key, PEM."""
    tls_client_ca: Text | None = None
    """File of the authority whose certificates clients must have, PEM."""

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class RayOptions:
    """The Ray cluster."""

    address: Text = "local"
    """local: a cluster of our own, ended with us; else an existing cluster's address, or auto."""
    num_cpus: Count | None = None
    """Logical CPUs of a local cluster; None: what the pools need."""
    object_store_bytes: Annotated[Bytes, Field(ge=75 << 20)] = 128 << 20
    """Ray's object store of a local cluster: bytes, or text such as "128MiB"; Ray takes no less than 75 MiB."""
    namespace: Text = "moefleet"


def _two_pools() -> PoolsConfig:
    return PoolsConfig(prefill=PoolConfig(), decode=PoolConfig())


@dataclass(frozen=True, slots=True, kw_only=True, config=_CLOSED)
class ServeConfig:
    """A served model: its pools, gateway and endpoints.

    Raises pydantic's ValidationError, a ValueError; `parse_config` turns it into ConfigError.
    """

    model: Text
    """Checkpoint folder, on every node."""
    model_name: Text | None = None
    """What clients call the model; None: the folder's name."""
    engine: EngineOptions = Field(default_factory=EngineOptions)
    pools: PoolsConfig = Field(default_factory=_two_pools)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    http: HttpOptions = Field(default_factory=HttpOptions)
    grpc: GrpcOptions = Field(default_factory=GrpcOptions)
    ray: RayOptions = Field(default_factory=RayOptions)

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model_name or Path(self.model).resolve().name


def parse_config(mapping: Mapping[str, object]) -> ServeConfig:
    """A ServeConfig out of plain values, as YAML or JSON give them.

    Raises:
        ConfigError: an unknown key, a missing one, or a value that cannot work; names the dotted key, the value and
            what would do.
    """
    try:
        return TypeAdapter(ServeConfig).validate_python(dict(mapping))
    except ValidationError as error:
        told = [_tell(each["type"], each["loc"], each["msg"], each["input"]) for each in error.errors()]
        raise ConfigError("; ".join(told)) from error


def config_mapping(config: ServeConfig) -> dict[str, object]:
    """Plain values that JSON and YAML can hold; `parse_config` gives the same config back."""
    return _without_none(asdict(config))


def engine_config(config: ServeConfig, role: Role) -> EngineConfig:
    """What one member of a pool is told.

    Raises:
        ConfigError: there is no such pool, or its numbers cannot work together.
    """
    pool = dict(config.pools.roles).get(role)
    if pool is None:
        raise ConfigError(f"pools.{role}: is not configured; pools are {', '.join(r for r, _ in config.pools.roles)}")
    options = config.engine
    try:
        return EngineConfig(
            model=Path(config.model),
            layout=pool.layout,
            dtype=options.dtype,
            state_dtype=options.state_dtype,
            expert_weights=options.expert_weights,
            device=options.device,
            kernels=options.kernels,
            deterministic=options.deterministic,
            reduction_groups=options.reduction_groups,
            block_size=options.block_size,
            kv_memory_bytes=pool.kv_memory,
            max_rows=pool.max_rows,
            max_step_tokens=pool.max_step_tokens,
            chunk_tokens=pool.chunk_tokens,
            max_model_len=options.max_model_len,
            max_waiting=pool.max_waiting,
            prefix_cache=options.prefix_cache,
            state_cache_share=options.state_cache_share,
            state_checkpoints=options.state_checkpoints,
            draft_tokens=options.draft_tokens,
            draft_policy=options.draft_policy,
            threads=pool.threads,
            lease_s=options.lease_s,
            kv_transport=options.kv_transport,
            step_timeout_s=options.step_timeout_s,
        )
    except ConfigError as error:
        raise ConfigError(f"pools.{role}: {error}") from error


def config_keys(owner: type = ServeConfig, prefix: str = "") -> dict[str, object]:
    """Every dotted key and its default (None for one that is required), in order of declaration."""
    keys: dict[str, object] = {}
    hints = get_type_hints(owner)
    for field in fields(owner):
        inner = _nested(hints[field.name])
        if inner is None:
            default: object = None if field.name == "model" else field.default
            # A default that must not be shared is made anew each time.
            keys[prefix + field.name] = (
                default.get_default(call_default_factory=True) if isinstance(default, FieldInfo) else default
            )
        else:
            keys |= config_keys(inner, f"{prefix}{field.name}.")
    return keys


def _nested(hint: object) -> type | None:
    """The dataclass in a type hint, be it optional."""
    return next((each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)), None)


def _tell(kind: str, location: tuple[int | str, ...], message: str, value: object) -> str:
    dotted = ".".join(str(part) for part in location)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return _tell_unknown(dotted, *(str(part) for part in location))
    if kind.startswith("missing"):
        return f"{dotted}: is required; give it a value"
    message = message.removeprefix("Value error, ").replace("Input should", "must")
    if kind == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {message}, got {value!r:.80}"


def _tell_unknown(dotted: str, *location: str) -> str:
    owner: type = ServeConfig
    for part in location[:-1]:
        owner = _nested(get_type_hints(owner)[part]) or owner
    known = [field.name for field in fields(owner)]
    close = difflib.get_close_matches(location[-1], known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{dotted}: unknown key; {remedy}"


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
