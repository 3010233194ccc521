"""Compiles a GPU's kernels when a rank loads: some dozens, longer together than a step may take.

Triton compiles a kernel when it first meets a size that is a constant in it: sizes of the model, few rows or many, one
range of keys or several. So a few steps in which all rows pad meet them all.
"""

import dataclasses
import logging
import time

import torch

from shards.cache import KvCache
from shards.comm import Comms
from shards.cuda_graphs import padding_step
from shards.linear import Runtime
from shards.mesh import Layout
from shards.model import Model
from shards.rows import StepTensors

_LOG = logging.getLogger(__name__)

_MANY_TOKENS = 65
"""More than a tile of the matmuls has rows."""
_LONG_CONTEXT = 1024
"""Positions that several programs share."""


def warm_up(model: Model, runtime: Runtime, cache: KvCache, *, layout: Layout, rotary_dim: int) -> None:
    """Run such steps before any sequence does; of all memory they may write state slot 0. No other rank takes part."""
    started = time.monotonic()
    runtime = dataclasses.replace(runtime, comms=Comms.echo(layout))
    for count in (1, _MANY_TOKENS):
        for context in (1, _LONG_CONTEXT):
            blocks = -(-context // cache.shape.block_size)
            device = cache.buffer.device
            step = padding_step(1, blocks, rotary_dim=rotary_dim, device=device, count=count, lanes=layout.dp)
            # Steps that are captured and such that verify drafts say which states advance, others do not.
            step = step if count == 1 else dataclasses.replace(step, advance_S=None)
            _run(model, runtime, cache, step)
    if cache.buffer.device.type == "cuda":
        torch.cuda.synchronize(cache.buffer.device)
    _LOG.info("kernels were compiled or found in %.1f s", time.monotonic() - started)


def _run(model: Model, runtime: Runtime, cache: KvCache, step: StepTensors) -> None:
    hidden_TC = model.forward(runtime, step, cache)
    if model.mtp is not None:
        embedded_TC = model.embed_tokens.embed(runtime, step.tokens_T)
        inputs = (runtime, embedded_TC, hidden_TC, step, cache.k_pools[-1], cache.v_pools[-1])
        model.mtp.store_kv(*inputs)
        hidden_TC = model.mtp.forward(*inputs)
        model.lm_head.logits(runtime, hidden_TC)
    model.lm_head.logits(runtime, hidden_TC)
