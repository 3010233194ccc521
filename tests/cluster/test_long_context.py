"""Prompts of tens of thousands of tokens: the same tokens however they are cut, in memory that was planned."""

import os
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig
from deploy.bench_engine import BenchEngine
from deploy.process_use import peak_rss_mb
from shards.families import load_model_config
from shards.mesh import Layout
from shards.step_memory import working_bytes
from tests.support.reference import make_reference

NEW_TOKENS = 8
KV_TOKEN_BYTES = 2 * 32 * 4
"""Of one attention layer with one KV head of 32."""
STATE_BYTES = 2 << 20
"""More than the rows' recurrent states take. Pages of all KV asked for are made when an engine starts."""
SLACK_MB = 32
"""States, a hundred thousand parameters, threads, the allocator's buffers; a prompt of 2048 tokens takes 17."""
SMALL: dict[str, object] = {
    "max_position_embeddings": 1 << 18,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def make_prompt(length: int) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def make_config(model: Path, context: int, step_tokens: int) -> EngineConfig:
    return EngineConfig(
        model=model,
        dtype="float32",
        kv_memory_bytes=context * KV_TOKEN_BYTES + STATE_BYTES,
        max_rows=2,
        max_step_tokens=step_tokens,
        max_model_len=context + NEW_TOKENS,
        prefix_cache=False,
        threads=1,
        step_timeout_s=300.0,
    )


def planned_mb(model: Path, context: int, step_tokens: int) -> float:
    """What a prompt takes at most by the plan that lets its engine start: KV, rows, rotary tables, the largest step."""
    limits = {"max_rows": 2, "max_model_len": context + NEW_TOKENS, "max_step_tokens": step_tokens, "block_size": 16}
    working = working_bytes(load_model_config(model), Layout(), itemsize=4, **limits)
    return (context * KV_TOKEN_BYTES + working) / (1 << 20) + SLACK_MB


def _serve(pipe: "Connection[tuple[list[int], float], None]", model: Path, context: int, step_tokens: int) -> None:
    before_mb = peak_rss_mb(os.getpid())
    with BenchEngine(make_config(model, context, step_tokens)) as engine:
        tokens = engine.generate([make_prompt(context)], NEW_TOKENS).tokens[0]
    pipe.send((tokens, peak_rss_mb(os.getpid()) - before_mb))


def generate(model: Path, context: int, step_tokens: int) -> tuple[list[int], float]:
    """A prompt's next tokens, and how much the peak memory of a process of its own grew meanwhile, in MB."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs, model, context, step_tokens), daemon=True)
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


@pytest.mark.slow
@pytest.mark.side_by_side
def test_prompt_of_32k_tokens_gives_the_same_tokens_in_any_chunks_in_the_memory_that_was_planned(
    tmp_path: Path,
) -> None:
    context = 32_768
    reference = make_reference(tmp_path, "qwen3_next", SMALL)
    tokens, grown_mb = generate(tmp_path, context, 2048)
    bound_mb = planned_mb(tmp_path, context, 2048)
    assert grown_mb < bound_mb
    again, smaller_mb = generate(tmp_path, context, 997)
    assert again == tokens
    assert smaller_mb < planned_mb(tmp_path, context, 997)
    # The bound can fail: the same prompt in one step takes more, as its own plan says.
    whole, whole_mb = generate(tmp_path, context, context)
    assert whole == tokens
    assert bound_mb < whole_mb < planned_mb(tmp_path, context, context)
    reference.set_attn_implementation("sdpa")
    with torch.no_grad():
        ids = torch.tensor([make_prompt(context) + tokens[:-1]])
        logits = reference(ids, use_cache=False, logits_to_keep=NEW_TOKENS).logits[0]
    assert logits.argmax(-1).tolist() == tokens


@pytest.mark.slow
@pytest.mark.side_by_side
def test_prompt_of_128k_tokens_is_served_in_the_memory_that_was_planned(tmp_path: Path) -> None:
    context = 131_072
    make_reference(tmp_path, "qwen3_next", SMALL)
    tokens, grown_mb = generate(tmp_path, context, 2048)
    assert len(tokens) == NEW_TOKENS
    assert grown_mb < planned_mb(tmp_path, context, 2048)
