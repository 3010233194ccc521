"""Reads one rank's slices of a checkpoint into tensors of the rank's device and dtype."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shards.config import Bits, ModelConfig
from shards.cuts import Cuts
from shards.int_experts import holds_ints, load_int_experts
from shards.int_weights import ExpertWeights
from shards.kernels.interface import Kernels
from shards.linear import DenseMlp, RowLinear
from shards.weight_memory import empty_weights
from shards.weights import CheckpointReader


def as_slice(part: range, scale: int = 1) -> slice:
    """The rows that units `part` take, `scale` rows a unit."""
    return slice(part.start * scale, part.stop * scale)


class WeightSource(Protocol):
    """Where a model's tensors come from, by their checkpoint names; `CheckpointReader` tells the rest."""

    @property
    def root(self) -> str:
        """What the text model's tensors are named under."""
        ...

    def head_name(self, *, tied: bool) -> str:
        """The tensor that makes logits."""
        ...

    def expect(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless the tensor has this shape."""
        ...

    def read(self, name: str, *slices: slice, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Slices of the leading axes of a tensor that was expected, into `out` or a new tensor of any device."""
        ...

    def read_experts(
        self,
        prefix: str,
        experts: range,
        columns: slice,
        *,
        expect: tuple[int, int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, C] and down [E, C, I] of some columns of some experts."""
        ...

    def finish(self, ignored_prefixes: tuple[str, ...]) -> None:
        """All was read; raise ValueError for a tensor that nobody wanted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Where a rank's parameters come from and go to. Every method raises ValueError naming tensor and shapes."""

    reader: WeightSource
    config: ModelConfig
    cuts: Cuts
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels
    """They lay out what they multiply with."""
    expert_bits: Bits | None = None
    """Of experts held as integers; None: they are of `dtype`, as are those that a checkpoint of integers leaves out."""

    def tensor(self, name: str, shape: tuple[int, ...], *slices: slice, dtype: torch.dtype | None = None) -> Tensor:
        """The given slices of tensor `name`, which has `shape` in the checkpoint."""
        self.reader.expect(name, shape)
        return self.reader.read(name, *slices, dtype=dtype or self.dtype).to(self.device)

    def stacked(self, parts: list[tuple[str, int, slice]], tail: tuple[int, ...]) -> Tensor:
        """Row slices of several tensors under one another; a part is (name, its rows in the checkpoint, slice)."""
        out = empty_weights((sum(s.stop - s.start for _, _, s in parts), *tail), self.dtype, self.device)
        end = 0
        for name, rows, part in parts:
            begin, end = end, end + part.stop - part.start
            self.reader.expect(name, (rows, *tail))
            self.reader.read(name, part, out=out[begin:end])
        return out

    def linear(self, parts: list[tuple[str, int, slice]]) -> Tensor:
        """`stacked` rows of matrices that take the hidden size, as `Kernels.linear` reads them."""
        return self.kernels.lay_out(self.stacked(parts, (self.config.hidden_size,)))

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """Matrices under one another, as `Kernels.linear` reads them."""
        out = empty_weights((sum(len(piece) for piece in pieces), *pieces[0].shape[1:]), self.dtype, self.device)
        return self.kernels.lay_out(torch.cat(pieces, out=out))

    def row_linear(self, name: str, inputs: int, part: slice, groups: int, *, bias: str | None = None) -> RowLinear:
        """Columns `part` of the [hidden_size, inputs] matrix `name`."""
        hidden = self.config.hidden_size
        return RowLinear(
            weight_NC=self.kernels.lay_out(self.tensor(name, (hidden, inputs), slice(None), part), groups=groups),
            bias_N=None if bias is None else self.tensor(bias, (hidden,)),
            groups=groups,
        )

    def mlp(self, prefix: str, width: int, columns: range, groups: int) -> DenseMlp:
        """gate_proj, up_proj and down_proj under `prefix`, `columns` of their `width`."""
        part = as_slice(columns)
        gate_up = [(f"{prefix}.gate_proj.weight", width, part), (f"{prefix}.up_proj.weight", width, part)]
        return DenseMlp(
            gate_up_2IC=self.linear(gate_up),
            down_proj=self.row_linear(f"{prefix}.down_proj.weight", width, part, groups),
        )

    def experts(self, prefix: str) -> tuple[ExpertWeights, ExpertWeights]:
        """Gate and up [E, 2I, C], down [E, C, I] of the experts and columns held here, as its kernels read them."""
        config, columns = self.config, as_slice(self.cuts.expert_columns)
        if self.expert_bits is not None:
            # Who makes weights up makes plain ones, and asks for them.
            assert isinstance(self.reader, CheckpointReader)
            if holds_ints(self.reader, prefix, config):
                return load_int_experts(self.reader, prefix, config, self.cuts, self.expert_bits)
        sizes = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
        gate_up, down = self.reader.read_experts(prefix, self.cuts.experts, columns, expect=sizes, dtype=self.dtype)
        groups = self.cuts.expert_groups
        return self.kernels.lay_out_experts(gate_up.to(self.device), down.to(self.device), groups=groups)
