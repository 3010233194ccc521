"""EngineConfig: everything one engine is told. Light to import: no torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from router.errors import ConfigError
from shards.mesh import Layout

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
KernelChoice = Literal["auto", "native", "torch", "triton"]
DeterministicChoice = Literal["auto", "on", "off"]
ExpertWeights = Literal["checkpoint", "int8", "int4"]
StateCheckpoints = Literal["exact", "int8"]
DraftPolicyChoice = Literal["adaptive", "always"]
KvTransport = Literal["auto", "tcp", "p2p", "nixl"]
MOST_DRAFT_TOKENS = 8
"""More never pay: drafts at that depth are hardly ever right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine: a model, its layout over ranks, and the limits of its steps.

    Raises ConfigError where a value cannot work whatever the model; what depends on the model is checked by
    `cluster.resolve.resolve_engine`.
    """

    model: Path
    """Checkpoint folder."""
    layout: Layout = field(default_factory=Layout)
    dtype: Dtype = "bfloat16"
    """Of weights, activations and KV; sums are float32."""
    state_dtype: Dtype = "float32"
    """Of recurrent states between tokens; they are computed with in float32. bfloat16: half the memory, less exact."""
    expert_weights: ExpertWeights = "checkpoint"
    """Of experts: as the checkpoint holds them (integers, or else dtype), or plain ones rounded to int8 or int4 when
    they are loaded: half or a quarter of the memory, and less exact."""
    device: Device = "cpu"
    kernels: KernelChoice = "auto"
    deterministic: DeterministicChoice = "auto"
    """Results of the same bits in every batch, chunking and layout; auto: on where native kernels run."""
    reduction_groups: int = 4
    """Parts of a row-parallel sum in deterministic mode: the most ranks that may share one."""
    block_size: int = 16
    """Tokens a KV block."""
    kv_memory_bytes: int = 256 << 20
    """KV and recurrent state of one rank."""
    max_rows: int = 64
    """Sequences that run at once in a lane."""
    max_step_tokens: int = 2048
    """Tokens a lane computes in one step, at most."""
    chunk_tokens: int | None = None
    """Prompt tokens of one sequence in one step, at most; None: max_step_tokens."""
    max_model_len: int | None = None
    """Prompt and output tokens of one request, at most; None: the model's limit."""
    max_waiting: int = 1024
    """Requests that wait for room; more are refused."""
    prefix_cache: bool = True
    """Reuse KV and recurrent state of equal prefixes."""
    state_cache_share: float = 0.25
    """Part of kv_memory_bytes for recurrent states kept for equal prefixes; not used without prefix_cache."""
    state_checkpoints: StateCheckpoints = "exact"
    """How these are kept. int8: three to four times as many fit, and what goes on from one is not exact."""
    draft_tokens: int = 0
    """Tokens drafted a row and step by the checkpoint's multi-token prediction head, at most; 0: none, and the head is
    not loaded."""
    draft_policy: DraftPolicyChoice = "adaptive"
    """adaptive: as many drafts as pay, down to none, by measured acceptance and step times; always: draft_tokens."""
    threads: int | None = None
    """Compute threads a rank; None: the machine's cores shared by the ranks that run on it."""
    lease_s: float = 30.0
    """A prefilled sequence waits this long to be fetched."""
    kv_transport: KvTransport = "auto"
    """How KV comes from prefill members: auto: shared memory on one host, TCP from others, P2P between GPUs; tcp; p2p:
    torch.distributed, gloo between CPUs and NCCL between GPUs."""
    step_timeout_s: float = 60.0
    """A step that takes longer counts as hung, and its replica as lost; more than the slowest step takes."""

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, get_args(Dtype))
        _one_of("state_dtype", self.state_dtype, get_args(Dtype))
        _one_of("expert_weights", self.expert_weights, get_args(ExpertWeights))
        _one_of("device", self.device, get_args(Device))
        _one_of("kernels", self.kernels, get_args(KernelChoice))
        _one_of("deterministic", self.deterministic, get_args(DeterministicChoice))
        _one_of("state_checkpoints", self.state_checkpoints, get_args(StateCheckpoints))
        _one_of("draft_policy", self.draft_policy, get_args(DraftPolicyChoice))
        _one_of("kv_transport", self.kv_transport, get_args(KvTransport))
        _check_draft_tokens(self.draft_tokens)
        for name in ("block_size", "kv_memory_bytes", "max_rows", "max_step_tokens", "max_waiting"):
            _at_least_one(name, getattr(self, name))
        for name in ("chunk_tokens", "max_model_len", "threads"):
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        if self.reduction_groups < 1 or self.reduction_groups & (self.reduction_groups - 1):
            raise ConfigError(f"reduction_groups must be a power of two, such as 4, got {self.reduction_groups}")
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"max_step_tokens={self.max_step_tokens} must be at least max_rows={self.max_rows}: each running "
                "sequence needs a token a step; raise max_step_tokens or lower max_rows"
            )
        self._check_states()
        self._check_kernels()
        for name in ("lease_s", "step_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive seconds, got {getattr(self, name)}")

    def _check_kernels(self) -> None:
        if self.expert_weights != "checkpoint" and (self.device == "cuda" or self.kernels == "triton"):
            raise ConfigError(
                f"expert_weights={self.expert_weights} runs on device=cpu with native or torch kernels, got "
                f"device={self.device} kernels={self.kernels}; use those, or expert_weights=checkpoint"
            )
        if self.deterministic == "on" and (self.kernels == "torch" or self.device == "cuda"):
            raise ConfigError(
                f"deterministic=on needs the native kernels, got kernels={self.kernels} device={self.device}; "
                "use kernels=native on device=cpu, or deterministic=auto"
            )

    def _check_states(self) -> None:
        if not 0 < self.state_cache_share < 1:
            raise ConfigError(
                f"state_cache_share must be between 0 and 1, got {self.state_cache_share}; to keep no states, turn "
                "prefix_cache off"
            )
        if self.state_checkpoints == "int8" and not self.prefix_cache:
            raise ConfigError(
                "state_checkpoints=int8 needs prefix_cache, without which no states are kept; turn prefix_cache on or "
                "use state_checkpoints=exact"
            )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_draft_tokens(value: int) -> None:
    if not 0 <= value <= MOST_DRAFT_TOKENS:
        raise ConfigError(
            f"draft_tokens={value}: a head drafts {MOST_DRAFT_TOKENS} tokens a step at most; "
            f"use 1 to {MOST_DRAFT_TOKENS}, or 0 for none"
        )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}")
