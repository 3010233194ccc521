"""Muon for weight matrices, after Keller Jordan's description: momentum whose singular values are all set to one."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_STEPS = 5
_WEIGHT_DECAY = 0.01
_A, _B, _C = 3.4445, -4.7750, 2.0315
"""The published quintic, whose five steps bring singular values of 0.01 to 1 near one."""


class Muon:
    """The momenta of matrices [rows, columns] and of stacks of them [experts, rows, columns]."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters by their gradients."""
        # Matrices of one shape together: many small products cost more than one large one.
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, parameter in enumerate(self._parameters):
            by_shape[parameter.shape[-2:]].append(index)
        for indices in by_shape.values():
            self._update(indices, lr)

    def _update(self, indices: list[int], lr: float) -> None:
        directions = [self._direction(index) for index in indices]
        rows, columns = directions[0].shape[-2:]
        updates = orthogonal(torch.cat(directions)) * max(1.0, rows / columns) ** 0.5
        for index, update in zip(indices, updates.split([len(each) for each in directions]), strict=True):
            parameter = self._parameters[index]
            parameter.mul_(1 - lr * _WEIGHT_DECAY).sub_(update.view_as(parameter), alpha=lr)

    def _direction(self, index: int) -> Tensor:
        """Nesterov momentum as a stack of matrices."""
        parameter = self._parameters[index]
        assert parameter.grad is not None
        momentum = self.momenta[index].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(momentum, _MOMENTUM).view(-1, *parameter.shape[-2:])


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices, about, whose singular values are all one: a Newton-Schulz iteration in bfloat16.

    Args:
        matrices: [N, rows, columns].
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).float()
