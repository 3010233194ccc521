"""Prompts of tens of thousands of tokens: the same tokens however they are cut, in memory that was planned."""

import os
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig
from deploy.bench_engine import BenchEngine
from deploy.process_use import peak_rss_mb
from tests.support.reference import make_reference

CONTEXT = 32_768
SMALL: dict[str, object] = {
    "max_position_embeddings": 1 << 17,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def generate(model: Path, prompt: list[int], step_tokens: int) -> list[int]:
    config = EngineConfig(
        model=model,
        dtype="float32",
        kv_memory_bytes=64 << 20,
        max_rows=2,
        max_step_tokens=step_tokens,
        max_model_len=CONTEXT + 8,
        prefix_cache=False,
        threads=1,
        step_timeout_s=300.0,
    )
    with BenchEngine(config) as engine:
        return engine.generate([prompt], 8).tokens[0]


@pytest.mark.slow
def test_prompt_of_32k_tokens_gives_the_same_tokens_in_any_chunks_in_bounded_memory(tmp_path: Path) -> None:
    reference = make_reference(tmp_path, "qwen3_next", SMALL)
    prompt = torch.randint(0, 131, (CONTEXT,), generator=torch.Generator().manual_seed(0)).tolist()
    before_mb = peak_rss_mb(os.getpid())
    tokens = generate(tmp_path, prompt, 2048)
    # 16 MB of KV, 8 MB of rotary tables, and steps of 2048 tokens of a model of a hundred thousand parameters.
    assert peak_rss_mb(os.getpid()) - before_mb < 400
    assert generate(tmp_path, prompt, 997) == tokens
    reference.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = reference(torch.tensor([prompt + tokens[:-1]]), use_cache=False, logits_to_keep=len(tokens)).logits[0]
    assert logits.argmax(-1).tolist() == tokens
