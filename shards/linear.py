"""What every layer needs to run on one rank of several, and the row-parallel matrix.

T tokens of the step, C inputs held here, N outputs.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from shards.comm import Comm, Comms
from shards.kernels.interface import Kernels
from shards.step_profile import StepProfile, part


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """The operators and groups of a rank."""

    kernels: Kernels
    comms: Comms
    exact: bool
    """Sums over ranks keep float32 and a fixed order, so that every layout gives the same bits."""
    profile: StepProfile | None = None

    def part(self, name: str) -> AbstractContextManager[None]:
        """What runs in the context is that part of a step, for a profile."""
        return part(self.profile, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLinear:
    """x @ weight.T with the inner axis spread over a group: every rank has a part of the sum."""

    weight_NC: Tensor
    bias_N: Tensor | None
    """Whole on every rank; added once, after the sum."""
    groups: int

    def forward(self, runtime: Runtime, comm: Comm, x_TC: Tensor) -> Tensor:
        """This rank's columns of x -> the whole result [T, N] on every rank of `comm`, in x's dtype."""
        wide = runtime.exact and (comm.size > 1 or self.bias_N is not None)
        y_TN = runtime.kernels.linear(x_TC, self.weight_NC, groups=self.groups, wide=wide)
        if self.bias_N is None:
            return comm.sum_to(y_TN, x_TC.dtype) if wide else comm.all_reduce(y_TN)
        return (comm.all_reduce(y_TN) + self.bias_N).to(x_TC.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMlp:
    """down(silu(gate(x)) * up(x)), its columns spread over the lane's ranks."""

    gate_up_2IC: Tensor
    """Rows of gate_proj held here, then those of up_proj."""
    down_proj: RowLinear

    def forward(self, runtime: Runtime, x_TC: Tensor) -> Tensor:
        """x -> [T, C] on every rank of the lane."""
        with runtime.part("mlp"):
            inner_TI = runtime.kernels.silu_mul(runtime.kernels.linear(x_TC, self.gate_up_2IC))
            return self.down_proj.forward(runtime, runtime.comms.tp, inner_TI)
