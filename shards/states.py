"""The recurrent states of one delta layer, and copies of them that are kept for later sequences.

M slots in which sequences run, J in which copies are kept where these have slots of their own, K copies made at once,
Q channels of the convolution, W its width, V value heads, D head dim (Dk of keys, Dv of values).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = 127
"""Largest int8 used: a range that is the same on both sides of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8States:
    """Kept states in int8, with a scale for each row of each head; what the convolution holds is kept as it is."""

    conv_JQW: Tensor
    delta_JVDD: Tensor
    """int8 [J, V, Dk, Dv]."""
    scales_JVD: Tensor
    """float32 [J, V, Dk]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStates:
    """Views into a rank's cache."""

    conv_MQW: Tensor
    delta_MVDD: Tensor
    int8: Int8States | None = None
    """None: kept states are exact, and lie in slots as running ones do."""

    def keep(self, slots_K: Tensor, kept_K: Tensor) -> None:
        """Copy slot slots_K[i] (int64) to the place kept_K[i] of kept states."""
        if self.int8 is None:
            _copy(self.conv_MQW, slots_K, self.conv_MQW, kept_K)
            _copy(self.delta_MVDD, slots_K, self.delta_MVDD, kept_K)
            return
        _copy(self.conv_MQW, slots_K, self.int8.conv_JQW, kept_K)
        states_KVDD, scales_KVD = quantise(self.delta_MVDD.index_select(0, slots_K))
        self.int8.delta_JVDD.index_copy_(0, kept_K, states_KVDD)
        self.int8.scales_JVD.index_copy_(0, kept_K, scales_KVD)

    def restore(self, kept_K: Tensor, slots_K: Tensor) -> None:
        """Copy the kept state kept_K[i] to slot slots_K[i]."""
        if self.int8 is None:
            self.keep(kept_K, slots_K)
            return
        _copy(self.int8.conv_JQW, kept_K, self.conv_MQW, slots_K)
        scales_KVD = self.int8.scales_JVD.index_select(0, kept_K)
        states_KVDD = dequantise(self.int8.delta_JVDD.index_select(0, kept_K), scales_KVD)
        self.delta_MVDD.index_copy_(0, slots_K, states_KVDD.to(self.delta_MVDD.dtype))


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """To int8 of the same shape, symmetric, with one float32 scale a row of the last axis.

    No number is off by more than half of its row's largest magnitude / 127. A row that holds NaN or infinity gets such
    a scale, and is not finite when it is read.
    """
    wide = states.float()
    scales = wide.abs().amax(-1).div(_MOST).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales.unsqueeze(-1)).round_().to(torch.int8), scales


def dequantise(states: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that `quantise` kept."""
    return states.float() * scales.unsqueeze(-1)


def _copy(source: Tensor, from_K: Tensor, target: Tensor, to_K: Tensor) -> None:
    """Along the first axis, which counts slots."""
    target.index_copy_(0, to_K, source.index_select(0, from_K))
