"""The optimizer of weight matrices."""

import torch
from torch import nn

from training.muon import Muon, orthogonal


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(4, 32, 96, generator=torch.Generator().manual_seed(0))

    values = torch.linalg.svdvals(orthogonal(matrices))

    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_stack_is_updated_as_its_matrices_would_be_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 3, 16, 8, generator=generator)
    stack, alone = nn.Parameter(start.clone()), [nn.Parameter(each.clone()) for each in start]
    stack.grad = gradient.clone()
    for parameter, each in zip(alone, gradient, strict=True):
        parameter.grad = each.clone()

    Muon([stack]).step(0.1)
    Muon(alone).step(0.1)

    torch.testing.assert_close(stack.detach(), torch.stack([each.detach() for each in alone]), rtol=0.02, atol=0.02)
