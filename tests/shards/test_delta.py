from pathlib import Path

import pytest
import torch

from tests.support.layers import run_mixer
from tests.support.reference import make_reference


@pytest.mark.parametrize(("tp", "chunk"), [(1, 60), (1, 1), (2, 7), (4, 60)])
@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 8), (4, 4), (4, 12)])
def test_key_heads_over_ranks_and_chunks_through_the_state_give_transformers_delta_net(
    key_heads: int, value_heads: int, tp: int, chunk: int, tmp_path: Path
) -> None:
    model = make_reference(
        tmp_path, "qwen3_next", {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    )
    x_TC = torch.randn(60, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.layers[0].linear_attn(x_TC[None])[0]

    outputs = run_mixer(tmp_path, 0, x_TC, tp=tp, chunk=chunk)

    assert len(outputs) == tp
    for y_TC in outputs:
        torch.testing.assert_close(y_TC, expected, rtol=0, atol=1e-4)
