"""The gated delta rule's two forms against transformers' and each other, from any state and cut anywhere."""

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from shards.kernels.torch_delta import CHUNK, LONGEST_RECURRENT, gated_delta_rule

V, DK, DV = 3, 16, 24
TOLERANCE = 2e-5


def make_inputs(n: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """q, k, v, beta, g of one sequence, and a state that it starts from."""
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (torch.nn.functional.normalize(random(1, n, V, DK), dim=-1) for _ in range(2))
    beta, g = random(1, n, V).sigmoid(), -random(1, n, V).exp()
    return (q * DK**-0.5, k, random(1, n, V, DV), beta, g), random(1, V, DK, DV)


@pytest.mark.parametrize("n", [1, LONGEST_RECURRENT, LONGEST_RECURRENT + 1, CHUNK - 1, CHUNK, CHUNK + 1, 200])
def test_both_forms_give_what_both_of_transformers_give(n: int) -> None:
    inputs, state = make_inputs(n)
    out, after = gated_delta_rule(*inputs, state)
    q, k, v, beta, g = inputs
    for theirs in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        # theirs scale q themselves.
        expected = theirs(q * DK**0.5, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(after, expected[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cuts", [[1], [16], [17], [64], [1, 2, 18, 82, 83, 150], [100, 120], list(range(1, 170))])
def test_sequence_cut_anywhere_gives_what_the_whole_gives(cuts: list[int]) -> None:
    inputs, state = make_inputs(170)
    whole, after = gated_delta_rule(*inputs, state)
    parts = []
    for begin, end in zip([0, *cuts], [*cuts, 170], strict=True):
        q, k, v, beta, g = (x[:, begin:end] for x in inputs)
        out, state = gated_delta_rule(q, k, v, beta, g, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(state, after, rtol=0, atol=TOLERANCE)
