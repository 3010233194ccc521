"""From an EngineConfig to what its ranks and scheduler are told: model, kernels, room. Imports torch."""

import math
import os
from dataclasses import dataclass
from typing import cast

from cluster.config import EngineConfig, KernelChoice
from cluster.memory import check_memory
from cluster.plan import KvLayout
from cluster.scheduler_config import SchedulerConfig
from router.errors import CheckpointError, ConfigError
from shards.cache import Room, fit, unit_shape
from shards.config import ModelConfig
from shards.cuts import check_layout
from shards.families import load_model_config
from shards.host_memory import available_memory
from shards.int_experts import check_int_experts, expert_bits, is_int_expert
from shards.int_weights import int_bytes
from shards.kernels.select import select_kernels
from shards.mesh import Place
from shards.rank import RankConfig, resolve_deterministic, torch_dtype
from shards.step_memory import working_bytes
from shards.weights import MTP_PREFIX, CheckpointReader


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedEngine:
    """An EngineConfig checked against its model and this machine; the same on all ranks."""

    config: EngineConfig
    model: ModelConfig
    kernels: KernelChoice
    """The set that runs here, never auto."""
    deterministic: bool
    num_blocks: int
    """KV blocks of a lane."""
    num_slots: int
    """Recurrent-state slots of a lane, running and kept; 0 for a model without recurrent state."""
    num_int8: int
    """Places of a lane for states kept in int8; 0: kept states take slots."""
    max_model_len: int
    threads: int

    def scheduler_config(self) -> SchedulerConfig:
        """Limits for the scheduler."""
        config, tp = self.config, self.config.layout.tp
        dtype, state_dtype = torch_dtype(config.dtype), torch_dtype(config.state_dtype)
        one = unit_shape(self.model, tp, block_size=config.block_size, dtype=dtype, state_dtype=state_dtype)
        return SchedulerConfig(
            lanes=config.layout.dp,
            num_blocks=self.num_blocks,
            num_slots=self.num_slots,
            num_int8=self.num_int8,
            block_size=config.block_size,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
            chunk_tokens=config.chunk_tokens or config.max_step_tokens,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            prefix_cache=config.prefix_cache,
            expert_share=self.model.num_experts_per_tok / max(self.model.num_experts, 1),
            draft_tokens=config.draft_tokens,
            draft_adaptive=config.draft_policy == "adaptive",
            lease_s=config.lease_s,
            # On a GPU kernels run behind the host, which cannot tell what they have written.
            offers_layers=config.device == "cpu",
            max_waiting=config.max_waiting,
            token_bytes=one.bytes_per_block * tp // config.block_size,
            state_bytes=one.bytes_per_slot * tp,
            checkpoint_bytes=(one.bytes_per_int8 if self.num_int8 else one.bytes_per_slot) * tp,
        )

    def rank_config(self, rank: int, device: str) -> RankConfig:
        """What rank `rank` is told; `device` is "cpu" or "cuda:<index>"."""
        config = self.config
        return RankConfig(
            model=config.model,
            place=Place(layout=config.layout, rank=rank),
            dtype=config.dtype,
            state_dtype=config.state_dtype,
            expert_weights=config.expert_weights,
            device=device,
            kernels=self.kernels,
            deterministic="on" if self.deterministic else "off",
            reduction_groups=config.reduction_groups,
            block_size=config.block_size,
            num_blocks=self.num_blocks,
            num_slots=self.num_slots,
            num_int8=self.num_int8,
            max_rows=config.max_rows,
            max_model_len=self.max_model_len,
            draft_tokens=config.draft_tokens,
            threads=self.threads,
        )

    def kv_layout(self) -> KvLayout:
        """Geometry of the cache, for tickets."""
        bits = expert_bits(self.model, self.config.expert_weights)
        return KvLayout(
            fingerprint=self.model.fingerprint(),
            tp=self.config.layout.tp,
            block_size=self.config.block_size,
            num_blocks=self.num_blocks,
            num_slots=self.num_slots,
            dtype=self.config.dtype,
            state_dtype=self.config.state_dtype,
            expert_weights="checkpoint" if bits is None else f"int{bits}",
        )


def resolve_engine(config: EngineConfig, *, ranks_here: int | None = None) -> ResolvedEngine:
    """Check a config against its checkpoint and this machine, and fill in what it leaves open.

    Args:
        ranks_here: ranks that run on this machine; None: all of them.

    Raises:
        CheckpointError: the checkpoint's config cannot be read or is not supported.
        ConfigError: layout, kernels, lengths or memory cannot work; names option, value and remedy.
    """
    ranks = ranks_here or config.layout.world
    try:
        model = load_model_config(config.model)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    weights = _weights(config, model)
    try:
        model = model.with_drafts(config.draft_tokens)
        _check_head(config, model)
        kernels = select_kernels(config.kernels, config.device)
        deterministic = resolve_deterministic(config.deterministic, config.kernels, config.device)
        _check_shares(config, model, kernels.name, deterministic=deterministic)
        _check_states(config, model)
        room = _room(config, model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    max_model_len = _max_model_len(config, model, room.num_blocks)
    if config.device == "cpu":
        _check_memory(config, model, max_model_len, weights=weights, ranks=ranks, available=available_memory())
    return ResolvedEngine(
        config=config,
        model=model,
        kernels=cast(KernelChoice, kernels.name),
        deterministic=deterministic,
        num_blocks=room.num_blocks,
        num_slots=room.num_slots,
        num_int8=room.num_int8,
        max_model_len=max_model_len,
        threads=config.threads or max(1, len(os.sched_getaffinity(0)) // ranks),
    )


def _weights(config: EngineConfig, model: ModelConfig) -> int:
    """`weight_bytes`, with its errors told apart."""
    try:
        expert_bits(model, config.expert_weights)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        return weight_bytes(config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_shares(config: EngineConfig, model: ModelConfig, kernels: str, *, deterministic: bool) -> None:
    """Refuse a layout that the model's shapes, or its experts' integers, do not allow."""
    check_layout(model, config.layout, deterministic=deterministic, groups=config.reduction_groups)
    check_int_experts(
        model,
        config.layout,
        config.expert_weights,
        device=config.device,
        kernels=kernels,
        deterministic=deterministic,
        groups=config.reduction_groups,
    )


def _check_head(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse drafts where a checkpoint of a family with heads was saved without one, as transformers does."""
    if config.draft_tokens and f"{MTP_PREFIX}fc.weight" not in _names(config, model):
        raise ConfigError(
            f"draft_tokens={config.draft_tokens} needs a multi-token prediction head, and {config.model} holds no "
            f"weights of one ({MTP_PREFIX}*); use draft_tokens=0, or the checkpoint as released"
        )


def _names(config: EngineConfig, model: ModelConfig) -> set[str]:
    return CheckpointReader(config.model, config=model).names()


def _check_states(config: EngineConfig, model: ModelConfig) -> None:
    """Refuse other than plain states where there are none: whoever asks for them expects memory back."""
    asked = {"state_dtype": (config.state_dtype, "float32"), "state_checkpoints": (config.state_checkpoints, "exact")}
    for name, (value, plain) in asked.items():
        if value != plain and not model.delta_layers:
            raise ConfigError(
                f"{name}={value} needs a model with recurrent state, which {model.architecture} has not; use "
                f"{name}={plain}"
            )


def _room(config: EngineConfig, model: ModelConfig) -> Room:
    """Blocks and recurrent-state slots of a lane that fit in the KV memory."""
    return fit(
        model,
        config.layout.tp,
        memory_bytes=config.kv_memory_bytes,
        block_size=config.block_size,
        dtype=torch_dtype(config.dtype),
        state_dtype=torch_dtype(config.state_dtype),
        max_rows=config.max_rows,
        checkpoint_share=config.state_cache_share if config.prefix_cache else 0.0,
        int8=config.state_checkpoints == "int8",
    )


def check_device_memory(engine: ResolvedEngine, available: int, *, where: str) -> None:
    """Refuse an engine of which one rank does not fit in a device's free memory, before weights are read.

    Raises:
        ConfigError: names what is needed and what there is, and the option to lower.
    """
    config = engine.config
    length, weights = engine.max_model_len, weight_bytes(config)
    _check_memory(config, engine.model, length, weights=weights, ranks=1, available=available, where=where)


def _check_memory(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    *,
    weights: int,
    ranks: int,
    available: int | None,
    where: str = "this machine",
) -> None:
    working = working_bytes(
        model,
        config.layout,
        itemsize=torch_dtype(config.dtype).itemsize,
        max_rows=config.max_rows,
        max_model_len=max_model_len,
        max_step_tokens=config.max_step_tokens,
        block_size=config.block_size,
        draft_tokens=config.draft_tokens,
    )
    check_memory(
        kv_bytes=config.kv_memory_bytes,
        weight_bytes=weights * ranks // config.layout.world,
        working_bytes=working,
        ranks=ranks,
        available=available,
        where=where,
    )


def weight_bytes(config: EngineConfig) -> int:
    """Weights of the whole model as they are held, from the headers of the files' tensors that are loaded."""
    model = load_model_config(config.model)
    reader, bits = CheckpointReader(config.model, config=model), expert_bits(model, config.expert_weights)
    itemsize = torch_dtype(config.dtype).itemsize
    unused = model.unused_tensors + (() if config.draft_tokens else (MTP_PREFIX,))
    loaded = {name: math.prod(reader.shape(name)) for name in reader.names() if not name.startswith(unused)}
    return sum(
        count * itemsize if bits is None or not is_int_expert(reader, name, model) else int_bytes(count, bits)
        for name, count in loaded.items()
    )


def _max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    room = num_blocks * config.block_size if model.attention_layers else model.max_position_embeddings
    asked = config.max_model_len
    if asked is None:
        return min(model.max_position_embeddings, room)
    if asked > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={asked} exceeds the model's max_position_embeddings={model.max_position_embeddings}; "
            "lower it"
        )
    if asked > room:
        raise ConfigError(
            f"max_model_len={asked} does not fit in kv_memory_bytes={config.kv_memory_bytes} (--kv-memory), which "
            f"holds {room} tokens of one sequence; raise kv_memory_bytes or lower max_model_len to at most {room}"
        )
    return asked
