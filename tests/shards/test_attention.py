from pathlib import Path

import pytest
import torch

from tests.support.layers import run_mixer
from tests.support.reference import make_reference


@pytest.mark.parametrize(("tp", "chunk"), [(1, 30), (1, 7), (2, 30), (4, 8), (8, 30)])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "qwen3_next"])
def test_heads_over_ranks_and_chunks_through_blocks_give_transformers_attention(
    architecture: str, tp: int, chunk: int, tmp_path: Path
) -> None:
    # Two KV heads: over 4 and 8 ranks each is held several times.
    changes = {"attention_bias": True} | ({"linear_num_key_heads": 8} if architecture == "qwen3_next" else {})
    model = make_reference(tmp_path, architecture, changes)
    x_TC = torch.randn(30, 48, generator=torch.Generator().manual_seed(0))
    layer = 1
    mask = torch.full((30, 30), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        positions = model.model.rotary_emb(x_TC[None], torch.arange(30)[None])
        expected = model.model.layers[layer].self_attn(
            hidden_states=x_TC[None], position_embeddings=positions, attention_mask=mask
        )[0][0]

    outputs = run_mixer(tmp_path, layer, x_TC, tp=tp, chunk=chunk)

    assert len(outputs) == tp
    for y_TC in outputs:
        torch.testing.assert_close(y_TC, expected, rtol=0, atol=2e-5)
