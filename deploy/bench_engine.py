"""An engine of this process that generates for lists of prompts at once, with the time that it takes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.config import Device, Dtype, EngineConfig, ExpertWeights
from cluster.engine_stats import EngineStats
from cluster.resolve import ResolvedEngine, resolve_engine
from cluster.spawn import LocalReplica
from cluster.speculation import DraftPolicy
from deploy.bench_profile import EngineSpan
from deploy.local_engine import stream_all
from router.errors import ConfigError
from router.request import Request, RequestId, SamplingParams
from shards.mesh import Layout
from shards.step_profile import StepProfile

DTYPES: Final[dict[str, Dtype]] = {"bf16": "bfloat16", "f32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What both bench commands are told of the engine."""

    layout: Layout
    threads: int | None
    kv_memory_bytes: int
    max_step_tokens: int
    draft_tokens: int = 0
    device: Device = "cpu"
    expert_weights: ExpertWeights = "checkpoint"

    def __post_init__(self) -> None:
        if self.max_step_tokens < 1:
            raise ConfigError(f"--max-step-tokens must be at least 1, got {self.max_step_tokens}")

    def engine_config(self, model: Path, *, dtype: Dtype, max_len: int, max_seqs: int) -> EngineConfig:
        """The engine of these options for one model, without prefix cache."""
        return EngineConfig(
            model=model,
            layout=self.layout,
            dtype=dtype,
            device=self.device,
            threads=self.threads,
            kv_memory_bytes=self.kv_memory_bytes,
            max_rows=max_seqs,
            max_step_tokens=max(self.max_step_tokens, max_seqs),
            max_model_len=max_len,
            prefix_cache=False,
            draft_tokens=self.draft_tokens,
            expert_weights=self.expert_weights,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """New tokens of each prompt, in order, and how long they took."""

    tokens: list[list[int]]
    wall_s: float
    """From the first prompt handed in to the last token."""
    ttft_s: list[float]
    """Until each prompt's first token."""
    prefill: EngineSpan
    """What the engine's thread did until the last of the first tokens."""
    decode: EngineSpan
    """And from then on."""
    arrivals_s: list[float]
    """When tokens came, step by step."""


class BenchEngine:
    """Ranks that are loaded, until the context ends; each `generate` is a batch of its own.

    What is learnt of drafts is kept, as in a member that serves.

    Args:
        profile: gets the time of each part of rank 0's steps.

    Raises:
        ConfigError, CheckpointError: the config cannot be served, see `resolve_engine`.
        MemberLostError: a rank failed at its start.
    """

    def __init__(self, config: EngineConfig, profile: StepProfile | None = None) -> None:
        self._engine = resolve_engine(config)
        self._replica = LocalReplica(self._engine, profile=profile)
        self._draft_policy = self._make_policy()
        self._read_stats: Callable[[], EngineStats] = EngineStats

    @property
    def stats(self) -> EngineStats:
        """The engine's counters of the latest `generate`."""
        return self._read_stats()

    def __enter__(self) -> "BenchEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        self._replica.close()

    def forget_drafts(self) -> None:
        """Let the next `generate` begin as a member does: nothing is known of drafts."""
        self._draft_policy = self._make_policy()

    def _make_policy(self) -> DraftPolicy:
        config = self._engine.scheduler_config()
        return DraftPolicy(config.draft_tokens, adaptive=config.draft_adaptive)

    def generate(self, prompts: Sequence[Sequence[int]], max_new: int) -> Generated:
        """Continue all prompts together, greedily, past the model's end tokens.

        Raises:
            ConfigError: they do not fit in the engine all at once.
            MoefleetError: a prompt is not valid, or the ranks failed.
        """
        check_room(self._engine, [len(prompt) + max_new for prompt in prompts])
        requests = _greedy(prompts, max_new)
        tokens: list[list[int]] = [[] for _ in prompts]
        ttft_s: list[float] = [0.0] * len(prompts)
        waiting, middle = len(prompts), EngineStats()
        started = time.perf_counter()
        served = stream_all(
            self._engine, self._replica.ranks, requests, draft_policy=self._draft_policy, on_begin=self._watch
        )
        arrivals_s: list[float] = []
        for events in served:
            now = time.perf_counter() - started
            arrivals_s.append(now)
            for event in events:
                index = int(event.request_id)
                if event.index == 0:
                    ttft_s[index] = now
                    waiting -= 1
                    middle = self.stats if not waiting else middle
                if event.token_id is not None:
                    tokens[index].append(event.token_id)
        wall_s, last_s = time.perf_counter() - started, max(ttft_s, default=0.0)
        return Generated(
            tokens=tokens,
            wall_s=wall_s,
            ttft_s=ttft_s,
            prefill=EngineSpan(begin=EngineStats(), end=middle, seconds=last_s),
            decode=EngineSpan(begin=middle, end=self.stats, seconds=wall_s - last_s),
            arrivals_s=arrivals_s,
        )

    def _watch(self, read_stats: Callable[[], EngineStats]) -> None:
        self._read_stats = read_stats


def _greedy(prompts: Sequence[Sequence[int]], max_new: int) -> list[Request]:
    """Requests by number, to be continued greedily."""
    sampling = SamplingParams(max_tokens=max_new, temperature=0.0)
    return [
        Request(id=RequestId(str(index)), prompt_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]


def check_room(engine: ResolvedEngine, num_tokens: Sequence[int]) -> None:
    """Refuse sequences of these lengths that would have to wait for each other: the figures would mislead.

    Raises:
        ConfigError: names the option, the value and what would do.
    """
    config = engine.config
    longest = max(num_tokens, default=0)
    if longest > engine.max_model_len:
        raise ConfigError(
            f"a prompt with its new tokens has {longest} tokens, the engine takes at most {engine.max_model_len}; ask "
            "for less, or raise max_len"
        )
    # Lanes are filled evenly.
    in_lane = sorted(num_tokens, reverse=True)[: -(-len(num_tokens) // config.layout.dp)]
    if len(in_lane) > config.max_rows:
        raise ConfigError(f"{len(in_lane)} prompts at once, the engine runs at most max_seqs={config.max_rows}")
    blocks = sum(-(-length // config.block_size) for length in in_lane)
    slots = len(in_lane) if engine.model.delta_layers else 0
    if blocks > engine.num_blocks or slots > engine.num_slots:
        raise ConfigError(
            f"{len(in_lane)} sequences of up to {longest} tokens need {blocks} KV blocks and {slots} state slots at "
            f"once; kv_memory_bytes={config.kv_memory_bytes} (--kv-memory) holds {engine.num_blocks} and "
            f"{engine.num_slots}; raise it"
        )
