"""Steps that `benchmarks.gpu_roofline` times: what each has to do at least, and how fast a device could be."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.gpu_models import RandomWeights
from shards.batch import RowSampling, RowStart, StepBatch
from shards.cache import CacheShape
from shards.config import ModelConfig

BLOCK = 16
WARM_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the device does at best."""

    name: str
    read_gb_s: float
    bf16_tflop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of step."""

    kind: Literal["decode", "prefill"]
    rows: int
    context: int
    """Positions of each row, of which decode computes the last and prefill all."""

    @property
    def tokens(self) -> int:
        """Computed in a step."""
        return self.rows if self.kind == "decode" else self.rows * self.context

    @property
    def blocks(self) -> int:
        """KV blocks of a row."""
        return -(-self.context // BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step has to do at least."""

    hit: float
    """Experts, in the mean of the layers."""
    read_bytes: int
    flops: int


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """How long each of some calls took, from an idle device to an idle device."""
    times: list[float] = []
    for _ in range(repeat):
        wait_for(device)
        started = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return times


def measure_machine(device: torch.device, repeat: int) -> Machine:
    """The fastest of some sums over memory far larger than a cache, and of some large products."""
    on_gpu = device.type == "cuda"
    values = torch.ones((4 << 30 if on_gpu else 128 << 20) // 4, device=device)
    side = 8192 if on_gpu else 512
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    for call in (values.sum, lambda: a @ b):
        seconds_of(call, WARM_STEPS, device)
    read_s = min(seconds_of(values.sum, repeat, device))
    product_s = min(seconds_of(lambda: a @ b, repeat, device))
    return Machine(
        name=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        read_gb_s=4 * values.numel() / read_s / 1e9,
        bf16_tflop_s=2 * side**3 / product_s / 1e12,
    )


def make_batches(cell: Cell, vocab_size: int) -> tuple[StepBatch, StepBatch]:
    """The step, with rows that start and without; each time it is carried out it computes the same positions anew."""
    draw = random.Random(1)
    first = cell.context - 1 if cell.kind == "decode" else 0
    known = (0,) * first
    starts = tuple(
        RowStart(
            row=row,
            token_ids=(*known, *(draw.randrange(vocab_size) for _ in range(cell.context - first))),
            prompt_len=cell.context,
            blocks=tuple(range(row * cell.blocks, (row + 1) * cell.blocks)),
            state_slot=row,
            sampling=RowSampling(temperature=0.0),
        )
        for row in range(cell.rows)
    )
    rows, counts = list(range(cell.rows)), [cell.context - first] * cell.rows
    ones = [1] * cell.rows
    step = StepBatch(rows_S=rows, first_S=[first] * cell.rows, counts_S=counts, samples_S=ones)
    return StepBatch(starts=starts, rows_S=rows, first_S=step.first_S, counts_S=counts, samples_S=ones), step


def count_work(model: ModelConfig, weights: RandomWeights, unit: CacheShape, cell: Cell, hits: Sequence[int]) -> Work:
    """Bytes of weights, KV and states, and flops of products, attention and delta rule; activations are left out.

    Args:
        weights: their counts.
        unit: a cache of one block and one slot.
        hits: experts that the step hit, of each layer that has any.
    """
    numbers = weights.other + weights.head + sum(hits) * weights.expert + cell.tokens * model.hidden_size
    # A row's keys and values are read once, or written and read; its states are read and written.
    kv = cell.rows * cell.context * unit.bytes_per_block // BLOCK * (1 if cell.kind == "decode" else 2)
    states = 2 * cell.rows * unit.bytes_per_slot
    pairs = cell.tokens * model.num_experts_per_tok * weights.moe_layers
    products = 2 * (cell.tokens * weights.other + cell.rows * weights.head + pairs * weights.expert)
    seen = cell.context if cell.kind == "decode" else cell.context * (cell.context + 1) // 2
    attention = 4 * cell.rows * seen * model.num_attention_heads * model.head_dim * len(model.attention_layers)
    state = model.linear_num_value_heads * model.linear_key_head_dim * model.linear_value_head_dim
    # Decay, the state times k, what is added to it, the state times q.
    delta = 7 * cell.tokens * state * len(model.delta_layers)
    return Work(
        hit=sum(hits) / max(1, len(hits)),
        read_bytes=numbers * unit.dtype.itemsize + kv + states,
        flops=products + attention + delta,
    )
