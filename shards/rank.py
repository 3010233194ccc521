"""One rank of a replica: loads its share of the model, holds its rows and cache, carries out step batches.

N rows sampled in a step, V vocabulary, T tokens of the step.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shards.batch import LaneOutput, LogprobColumns, StepBatch
from shards.cache import KvCache, cache_shape
from shards.comm import Comms
from shards.config import ModelConfig
from shards.cuda_graphs import CudaRecorder, DecodeGraphs
from shards.cuts import check_layout, make_cuts
from shards.decode_tapes import DecodeTapes
from shards.drafting import Drafter
from shards.families import load_model_config
from shards.int_experts import ExpertChoice, check_int_experts, expert_bits
from shards.kernels.native import NativeKernels
from shards.kernels.select import select_kernels
from shards.linear import Runtime
from shards.loading import Loader, WeightSource
from shards.mesh import Place
from shards.model import Model, load_model
from shards.mtp import Mtp
from shards.rope import rotary_tables
from shards.rows import PromptSpan, Rows
from shards.sampler import Sampler
from shards.shm import ShmComm
from shards.step_profile import StepProfile, part
from shards.verify import Draws, Replay
from shards.warm_up import warm_up
from shards.weights import MTP_PREFIX, CheckpointReader

KernelsName = Literal["auto", "native", "torch", "triton"]
DeterministicMode = Literal["auto", "on", "off"]

PROMPT_LOGITS_ROWS = 256
"""Prompt positions whose logits are in memory at once: 256 x 151,936 float32 are 156 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """What one rank needs to know to start."""

    model: Path
    """Checkpoint folder."""
    place: Place
    dtype: Literal["float32", "bfloat16"] = "float32"
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    expert_weights: ExpertChoice = "checkpoint"
    device: str = "cpu"
    kernels: KernelsName = "auto"
    deterministic: DeterministicMode = "auto"
    reduction_groups: int = 4
    block_size: int = 16
    num_blocks: int
    num_slots: int
    num_int8: int = 0
    """Places for states kept in int8; 0: they are kept exactly, in slots."""
    max_rows: int
    max_model_len: int
    draft_tokens: int = 0
    """Most tokens drafted behind a row in a step; 0: the multi-token prediction head is not loaded."""
    threads: int | None = None
    """CPU threads of this rank; None leaves torch's own choice."""


def torch_dtype(name: Literal["float32", "bfloat16"]) -> torch.dtype:
    """The torch dtype by that name."""
    return torch.float32 if name == "float32" else torch.bfloat16


def resolve_deterministic(mode: DeterministicMode, kernels: KernelsName, device: str) -> bool:
    """Whether ranks of this configuration give the same bits in every layout; auto is on where the kernels can.

    Raises:
        ValueError: it is asked for and the kernels that would run cannot.
    """
    chosen = select_kernels(kernels, device)
    if mode == "on" and not chosen.deterministic:
        raise ValueError(
            f"deterministic=on needs kernels=native; kernels={kernels} on device={device} gives {chosen.name}; "
            "use kernels=native on a cpu, or deterministic=auto"
        )
    return mode != "off" and chosen.deterministic


def _tensors_without_use(model: ModelConfig, root: str) -> list[str]:
    """Prefixes of tensors that a checkpoint may hold and the model has no use for."""
    unused = [*model.unused_tensors, *(() if model.num_nextn_predict_layers else (MTP_PREFIX,))]
    if not model.shared_expert_intermediate_size:
        # transformers saves empty ones.
        unused += [f"{root}.layers.{i}.mlp.shared_expert" for i in range(model.num_hidden_layers)]
    return unused


class Rank:
    """Not thread-safe: `load` and `step` are called from one thread. `close` ends it.

    Args:
        profile: gets the time of each part of the steps; None: nothing is timed.

    Raises:
        ValueError: the config, the checkpoint's config or the layout cannot be served; names field, value, remedy.
    """

    def __init__(self, config: RankConfig, comms: Comms, profile: StepProfile | None = None) -> None:
        self.config = config
        self._profile = profile
        self.model_config = load_model_config(config.model).with_drafts(config.draft_tokens)
        self._device = torch.device(config.device)
        exact = resolve_deterministic(config.deterministic, config.kernels, config.device)
        kernels = select_kernels(config.kernels, config.device)
        self._check_shares(kernels.name, exact)
        self._plain_runtime = Runtime(kernels=kernels, comms=comms, exact=exact, profile=profile)
        if profile is not None:
            kernels, comms = profile.timed_kernels(kernels), profile.timed_comms(comms)
        self._runtime = Runtime(kernels=kernels, comms=comms, exact=exact, profile=profile)
        self._model: Model | None = None
        self._graphs: DecodeGraphs | None = None
        self._tapes: DecodeTapes | None = None
        shape = cache_shape(
            self.model_config,
            config.place.layout.tp,
            config.place.tp_rank,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_slots=config.num_slots,
            num_int8=config.num_int8,
            dtype=torch_dtype(config.dtype),
            state_dtype=torch_dtype(config.state_dtype),
        )
        self.cache = KvCache(shape, self._device)
        self._rows = Rows(
            max_rows=config.max_rows,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=self._device,
        )
        cos_LR, sin_LR = rotary_tables(self.model_config.rope, config.max_model_len)
        self._cos_LR, self._sin_LR = cos_LR.to(self._device), sin_LR.to(self._device)
        self._sampler = Sampler(self.model_config.vocab_size, self._device, kernels)

    def _check_shares(self, kernels: str, exact: bool) -> None:
        config, layout = self.config, self.config.place.layout
        check_layout(self.model_config, layout, deterministic=exact, groups=config.reduction_groups)
        check_int_experts(
            self.model_config,
            layout,
            config.expert_weights,
            device=config.device,
            kernels=kernels,
            deterministic=exact,
            groups=config.reduction_groups,
        )

    def load(self, progress: Callable[[int, int], None] | None = None, *, weights: WeightSource | None = None) -> None:
        """Read this rank's share of the checkpoint; `progress` gets (bytes done, bytes in all).

        Args:
            weights: where they come from instead of the checkpoint's files.

        Raises:
            ValueError: a tensor is missing, surplus, of the wrong shape, a file is broken, or the device is too small.
        """
        try:
            self._load(progress, weights)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the weights do not fit on {self._device} beside {self.cache.shape.total_bytes} bytes of KV; lower "
                "kv_memory_bytes, or spread the model over more ranks"
            ) from error

    def _load(self, progress: Callable[[int, int], None] | None, weights: WeightSource | None) -> None:
        config, dtype = self.config, torch_dtype(self.config.dtype)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        cuts = make_cuts(
            self.model_config, config.place, deterministic=self._runtime.exact, groups=config.reduction_groups
        )
        reader = weights or CheckpointReader(config.model, progress, config=self.model_config)
        loader = Loader(
            reader=reader,
            config=self.model_config,
            cuts=cuts,
            dtype=dtype,
            device=self._device,
            kernels=self._runtime.kernels,
            expert_bits=expert_bits(self.model_config, config.expert_weights),
        )
        with torch.inference_mode():
            self._model = load_model(loader)
            if self._device.type == "cuda" and self._runtime.kernels.name == "triton":
                rotary_dim = self.model_config.rope.rotary_dim
                warm_up(self._model, self._runtime, self.cache, layout=config.place.layout, rotary_dim=rotary_dim)
            self._tapes = self._make_tapes(self._model)
            if self._tapes is not None and config.draft_tokens:
                self._tapes.record_ahead()
        self._graphs = self._make_graphs(self._model)
        reader.finish(tuple(_tensors_without_use(self.model_config, reader.root)))

    def step(self, batch: StepBatch) -> LaneOutput | None:
        """Carry out one batch; every rank of the replica is called with its lane's batch, in the same order.

        Returns:
            the lane's answer on its first TP rank, None on the others.
        """
        assert self._model is not None
        started = time.monotonic()
        if self._profile is not None:
            self._profile.begin("decode" if batch.only_decodes else "prefill")
        with torch.inference_mode():
            with part(self._profile, "inputs"):
                self._rows.update(batch)
            with part(self._profile, "states"):
                self.cache.restore_states(batch.restore_from, batch.restore_to)
            lane_tokens, *lane_drafts = self._lane_counts(batch)
            output = self._compute(self._model, batch, lane_tokens, lane_drafts) if any(lane_tokens) else LaneOutput()
            with part(self._profile, "states"):
                self._keep_states(batch)
        if not self.config.place.is_lane_leader:
            return None
        return dataclasses.replace(output, compute_s=time.monotonic() - started)

    def close(self) -> None:
        """Let go of cache and weights."""
        self._model = self._graphs = self._tapes = None
        self.cache.close()

    def _make_graphs(self, model: Model) -> DecodeGraphs | None:
        """None where steps run as they are: other kernels, ranks in groups and profiles wait for the device."""
        alone = self.config.place.layout.world == 1 and self._profile is None
        if not alone or self._device.type != "cuda" or self._runtime.kernels.name != "triton":
            return None
        return DecodeGraphs(lambda step: model.forward(self._runtime, step, self.cache), CudaRecorder())

    def _make_tapes(self, model: Model) -> DecodeTapes | None:
        """None where steps run as they are: other kernels, ranks that are not of one host and lane."""
        comms, kernels = self._plain_runtime.comms, self._plain_runtime.kernels
        near = comms.world.size == 1 or (comms.dp.size == 1 and isinstance(comms.tp, ShmComm))
        if not near or not isinstance(kernels, NativeKernels):
            return None
        rotary = self._cos_LR, self._sin_LR
        return DecodeTapes(model, self._plain_runtime, self.cache, self._rows, rotary, self.config.draft_tokens)

    def _keep_states(self, batch: StepBatch) -> None:
        """Copy the states that are kept behind the ends of rows; those before that are copied in the layers."""
        if not batch.save_rows:
            return
        ends = {row: first + n for row, first, n in zip(batch.rows_S, batch.first_S, batch.counts_S, strict=True)}
        at_end = [i for i, row in enumerate(batch.save_rows) if batch.save_ends[i] == ends[row]]
        rows = [batch.save_rows[i] for i in at_end]
        self.cache.keep_states(self._rows.state_slots(rows), [batch.save_to[i] for i in at_end])

    def _lane_counts(self, batch: StepBatch) -> list[tuple[int, ...]]:
        """Every lane's number of tokens in this step, then for each depth its number of rows that draft that far."""
        dp = self._runtime.comms.dp
        depths = range(self.config.draft_tokens)
        counts = [sum(batch.counts_S), *(sum(drafts > depth for drafts in batch.drafts_S) for depth in depths)]
        if dp.size == 1:
            return [(count,) for count in counts]
        lanes = dp.all_gather(torch.tensor([counts], dtype=torch.int64, device=self._device))
        return [tuple(column) for column in lanes.T.tolist()]

    def _compute(
        self, model: Model, batch: StepBatch, lane_tokens: tuple[int, ...], lane_drafts: list[tuple[int, ...]]
    ) -> LaneOutput:
        if self._tapes is not None and self._tapes.prepare(batch, plain=self._rows.are_plain(batch.rows_S)):
            return self._decode(model, self._tapes, batch)
        with part(self._profile, "inputs"):
            step = self._rows.tensors(batch, self._cos_LR, self._sin_LR, lane_tokens)
        if self._graphs is None:
            hidden_TC = model.forward(self._runtime, step, self.cache)
        else:
            hidden_TC = self._graphs.forward(step)
        prompt_logprobs: dict[int, LogprobColumns] = {}
        for span in self._rows.prompt_spans(batch):
            prompt_logprobs[span.row] = self._prompt_logprobs(model, hidden_TC, span)
        draws = Draws.of(batch)
        kept, output = self._draw(model, hidden_TC, draws) if draws.rows else ([], LaneOutput())
        if step.advance_S is not None and step.delta_inputs:
            replay = Replay.of(draws, kept, step.advance_S, step.state_slots_S)
            model.replay(self._runtime, step, replay, self.cache)
        if model.mtp is not None:
            with part(self._profile, "drafts"):
                self._drafter(model, model.mtp).run(step, hidden_TC, draws, kept, lane_drafts, keeps=batch.keeps_mtp)
        return dataclasses.replace(output, prompt_logprobs=prompt_logprobs) if prompt_logprobs else output

    def _decode(self, model: Model, tapes: DecodeTapes, batch: StepBatch) -> LaneOutput:
        """A step in which every row draws behind each of its positions."""
        logprobs, draws = None, Draws.of(batch)
        result = tapes.run(batch)
        with part(self._profile, "sampling"):
            if not tapes.is_plain:
                logits_NV = model.lm_head.joined(self._runtime, result)
                result, logprobs = self._sample(logits_NV, draws.rows_N, draws.positions_N)
        kept = tapes.follow(result)
        return draws.answer(result.tolist(), kept, logprobs)

    def _draw(self, model: Model, hidden_TC: Tensor, draws: Draws) -> tuple[list[int], LaneOutput]:
        """Choose the sampled rows' tokens -> how many stay of each row's draws, and these as the lane's answer."""
        with part(self._profile, "head"):
            if len(draws.tokens_N) < hidden_TC.shape[0]:
                hidden_TC = hidden_TC[torch.tensor(draws.tokens_N, device=self._device)]
        if self._rows.are_plain(draws.rows_N):
            tokens_N, logprobs = model.lm_head.best(self._runtime, hidden_TC), None
        else:
            logits_NV = model.lm_head.logits(self._runtime, hidden_TC)
            with part(self._profile, "sampling"):
                tokens_N, logprobs = self._sample(logits_NV, draws.rows_N, draws.positions_N)
        with part(self._profile, "sampling"):
            verifying = len(draws.rows_N) > len(draws.rows)
            drafted_N = self._rows.tokens_at(draws.rows_N, draws.positions_N).tolist() if verifying else []
            self._rows.store(draws.rows_N, draws.positions_N, tokens_N)
            drawn_N = tokens_N.tolist()
        kept = draws.accept(drawn_N, drafted_N) if verifying else draws.counts
        return kept, draws.answer(drawn_N, kept, logprobs)

    def _drafter(self, model: Model, mtp: Mtp) -> Drafter:
        return Drafter(
            runtime=self._runtime,
            model=model,
            mtp=mtp,
            rows=self._rows,
            cache=self.cache,
            cos_LR=self._cos_LR,
            sin_LR=self._sin_LR,
        )

    def _sample(
        self, logits_NV: Tensor, rows_N: list[int], positions_N: list[int]
    ) -> tuple[Tensor, LogprobColumns | None]:
        """The lane's first rank chooses, the others hear of it -> token ids int64 [N]."""
        tp, rows = self._runtime.comms.tp, self._rows
        if tp.rank:
            return tp.broadcast(torch.empty(len(rows_N), dtype=torch.int64, device=self._device), 0), None
        histories = [
            (rows.tokens_RL[row, :position], rows.prompt_lens[row])
            for row, position in zip(rows_N, positions_N, strict=True)
        ]
        samplings = [rows.samplings[row] for row in rows_N]
        tokens_N, logprobs = self._sampler.sample(logits_NV, samplings, positions_N, histories)
        return tp.broadcast(tokens_N, 0), logprobs

    def _prompt_logprobs(self, model: Model, hidden_TC: Tensor, span: PromptSpan) -> LogprobColumns:
        """Log probabilities of the prompt tokens behind a row's positions, some positions at a time."""
        parts = []
        for done in range(0, span.count, PROMPT_LOGITS_ROWS):
            count = min(PROMPT_LOGITS_ROWS, span.count - done)
            first, position = span.first_token + done, span.first_position + done + 1
            logits_NV = model.lm_head.logits(self._runtime, hidden_TC[first : first + count])
            next_N = self._rows.tokens_RL[span.row, position : position + count]
            parts.append(self._sampler.prompt_logprob_columns(logits_NV, next_N, span.num_top))
        return LogprobColumns(
            logprobs_N=[x for part in parts for x in part.logprobs_N],
            ranks_N=[x for part in parts for x in part.ranks_N],
            top_ids_NK=[x for part in parts for x in part.top_ids_NK],
            top_logprobs_NK=[x for part in parts for x in part.top_logprobs_NK],
        )
